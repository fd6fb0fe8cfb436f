"""Your own images: any folder, labels or none, read where the files are.

python -m mae_dist.main --config configs/folder.py:mini,64,8 --config.data.data_dir=/my/images
python -m mae_dist.main --config configs/folder.py --config.data.data_dir=/my/images
python -m mae_dist.main --config configs/folder.py:base,224,16 --config.data.data_dir=/my/images

After the colon: the model (mini, tiny, small, base), the side of the images and that of the patches, in pixels. mini is
for a first look on a laptop: four blocks, 40 epochs instead of 400. A batch is divided to fit the accelerator's memory.
`data.labels='folders'`, for a directory per class, adds kNN and ridge accuracy; otherwise the effective rank of the
features says how it goes.
"""

from ml_collections import ConfigDict

import mae_dist

# Width, blocks and heads of the encoder, then of the decoder.
_MODELS = {
    "mini": (256, 4, 4, 128, 2, 4),
    "tiny": (192, 12, 3, 128, 4, 4),
    "small": (384, 12, 6, 256, 6, 8),
    "base": (768, 12, 12, 512, 8, 16),
}


def get_config(choice: str = "tiny,96,8") -> ConfigDict:
    """Returns the config for `MODEL[,IMAGE_SIDE[,PATCH_SIDE]]`."""
    model, *sides = choice.split(",")
    image, patch = [*map(int, sides), *(96, 8)[len(sides) :]]
    config = mae_dist.default_config()
    config.name = "folder"
    names = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    config.model.update(dict(zip(names, _MODELS[model], strict=True)))
    config.model.image_size, config.model.patch_size = (image, image), (patch, patch)
    config.model.mlp_ratio = config.model.decoder_mlp_ratio = 4.0
    config.pretrain.norm_pix_loss = True
    is_mini = model == "mini"
    rarely = 1.0 if is_mini else 10.0
    config.total_epochs = 40.0 * rarely
    config.global_batch_size = 64 if is_mini else 256
    config.accum_steps = 0  # by the memory of an accelerator
    config.log_every_steps = 20
    config.optim.base_lr = {"mini": 4e-3, "base": 1.5e-4}.get(model, 5e-4)
    config.optim.warmup_epochs = 2.0 * rarely
    config.data.source = "folder"
    config.data.train_split, config.data.val_split, config.data.test_split = "train", "val", ""
    config.data.augment = "crop_flip"
    config.data.max_bad_share = 0.05  # broken files are skipped and named in bad_files.txt
    config.data.mean, config.data.std = (), ()  # measured
    config.eval.every_epochs = config.online.every_epochs = config.pictures.every_epochs = 2.0 * rarely
    config.checkpoint.every_steps = 200
    return config
