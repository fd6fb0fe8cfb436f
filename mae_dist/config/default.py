"""Every config field with its default and meaning.

The files in `configs/` change some of them, and `--config.a.b=value` any. This file imports nothing of mae_dist.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default config, locked: setting a field that does not exist here is an error."""
    config = ConfigDict()

    config.name = "default"  # names the run: the workdir is runs/<name> unless --workdir says otherwise
    config.task = "pretrain"  # pretrain | probe (frozen encoder) | finetune (all weights; no init_from: from scratch)
    config.imports = ()  # your modules that register tasks, masking strategies, sources, optimizers, augmentations
    config.init_from = ""  # start from these weights: a workdir, a converted model, HF's or timm's layout, hf://…
    config.init_commit = ""  # of hf://…: the commit to take; "": that of the first start, which the run writes here
    config.init_inflate = False  # init_from: spread its patch embedding over other model.channels; the decoder is new
    config.compiled_step = ""  # of plan --save, a file of your own (it is code): load the step instead of compiling it
    config.seed = 0  # of everything random: initial weights, data order, augmentation, masks, dropout

    config.total_epochs = 100.0  # passes over the training split
    config.total_steps = 0  # > 0: train for this many steps instead; the warm-up is scaled in proportion
    config.global_batch_size = 256  # examples per step, over all devices and processes
    config.accum_steps = 1  # microbatches per step, computed one after another; 0: as an accelerator's memory needs
    config.ema_decay = 0.0  # > 0: evaluate and export a moving average of the parameters
    config.log_every_steps = 50  # fetch metrics from the device and write them this often
    config.trackers = ()  # send metrics and pictures to these too: wandb, mlflow, trackio, or yours of imports
    config.trace = False  # record a checksum of each step's images and masks, to compare runs
    config.profile_steps = ""  # "10:15": profiler trace of steps 10 to 15, in profile/; SIGUSR1: of the next five
    config.max_skipped_steps = 20  # stop ("diverged") after this many steps in a row with a non-finite gradient

    config.cpu = ConfigDict()  # used without an accelerator; 0, "auto": chosen once for this machine
    config.cpu.devices = 0  # JAX devices on the cores; 0: one per core, as far as batches divide
    config.cpu.pieces = 0  # microbatches per device and step; 0: as many as make them fit the cache
    config.cpu.products = "auto"  # float32 matmuls by "onednn" or "xla"; auto: by model and cores
    config.cpu.fold = True  # fold LayerNorm's and LayerScale's scales into the weights, once per step

    config.mesh = ConfigDict()  # devices = data x fsdp x tensor; one of them may be -1: the rest
    config.mesh.data = -1  # copies of the model, each with its part of the batch
    config.mesh.fsdp = 1  # shards parameters and optimizer state, and the batch too
    config.mesh.tensor = 1  # shards attention heads and MLP width

    config.model = ConfigDict()
    config.model.image_size = (32, 32)  # (height, width) in pixels; other images are resized to it
    config.model.channels = 3  # 1 gray, 3 RGB, 4 RGBA
    config.model.patch_size = (4, 4)  # (height, width) of a patch; divides image_size
    config.model.embed_dim = 128  # encoder width
    config.model.depth = 3  # encoder blocks
    config.model.num_heads = 4  # encoder attention heads; divides embed_dim
    config.model.mlp_ratio = 2.0  # encoder MLP width / embed_dim
    config.model.decoder_embed_dim = 64  # decoder width
    config.model.decoder_depth = 1  # decoder blocks
    config.model.decoder_num_heads = 4  # decoder attention heads; divides decoder_embed_dim
    config.model.decoder_mlp_ratio = 2.0  # decoder MLP width / decoder_embed_dim
    config.model.decoder = "full"  # full (self-attention over all patches) | cross (attention to the encoder's tokens)
    config.model.predict_ratio = 1.0  # cross: fraction of the removed patches that a training step predicts, at random
    config.model.fuse_blocks = False  # cross: each decoder block reads its own learned sum of all encoder blocks
    config.model.mask_ratio = 0.75  # fraction of patches removed; int(patches * (1 - mask_ratio)) are kept
    config.model.masking = "random"  # random (per example) | grid (regular) | block (rectangles) | user (mask_file)
    config.model.mask_file = ""  # for user: .npy (rows, columns) of patches, 1 = removed; replaces mask_ratio
    config.model.mask_block = 1  # patches a side of the squares that are kept or removed as one; divides the grid
    config.model.cls_token = "learned"  # learned | zero | none
    config.model.cls_tokens = 1  # class tokens before the patches; 0: none, as cls_token="none"
    config.model.mask_token = "learned"  # learned | zero
    config.model.pos_embed = "sincos2d"  # sincos2d (the paper's) | sincos1d (the report's) | learned
    config.model.layer_scale_init = 0.0  # initial value of LayerScale; 0: no LayerScale
    config.model.norm_eps = 1e-6  # of every LayerNorm, as in the paper's code; Hugging Face's default is 1e-12
    config.model.drop_path = 0.0  # stochastic depth of the last encoder block, rising linearly from 0
    config.model.dropout = 0.0  # probability that a value is dropped, after the position embedding and in every block
    config.model.qkv_bias = True  # biases for queries, keys and values
    config.model.gelu = "exact"  # exact | tanh (its approximation)
    config.model.dtype = "float32"  # compute: float32 | bfloat16; parameters, softmax, norms and loss stay float32
    config.model.scan = False  # compile one block and loop over it: much faster compilation for deep models
    # Recompute in the backward pass: none | dots (keep matmuls) | blocks (keep inputs) | auto (by an accelerator's
    # memory; with accum_steps=0: none)
    config.model.remat = "auto"

    config.pretrain = ConfigDict()
    config.pretrain.norm_pix_loss = False  # the target is each patch with mean 0 and variance 1

    config.classify = ConfigDict()  # for probe and finetune
    config.classify.head = "linear"  # linear | mlp (one hidden layer)
    config.classify.hidden_dim = 128  # of the mlp head
    config.classify.pool = "gap"  # gap (mean over patches) | cls (class token, of several the mean); also for online
    config.classify.norm_after_pool = False  # True: a new LayerNorm after pooling instead of the encoder's last
    config.classify.batch_norm = False  # probe: a BatchNorm without scale and bias before the head, as in the paper
    config.classify.label_smoothing = 0.0  # fraction of each target that is spread evenly over all classes
    config.classify.mixup = 0.0  # finetune: alpha of mixup, each image with its neighbour in the batch; the paper: 0.8
    config.classify.cutmix = 0.0  # finetune: alpha of cutmix; the paper: 1.0
    config.classify.mix_prob = 1.0  # probability that an image is mixed, if mixup or cutmix is on
    config.classify.mix_switch_prob = 0.5  # probability of cutmix instead of mixup, if both are on
    config.classify.erase_prob = 0.0  # finetune: probability of a random box of noise; the paper: 0.25

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw | muon (matrices of blocks; else adamw) | sgd (momentum) | lars (trust ratios)
    config.optim.base_lr = 1e-3  # peak learning rate = base_lr * global_batch_size / 256
    config.optim.schedule = "cosine"  # cosine | constant, after the warm-up
    config.optim.final_lr = 0.0  # the cosine's last value
    config.optim.warmup_epochs = 20.0  # linear warm-up from 0; at most total_epochs
    config.optim.b1 = 0.9  # of adamw: decay of the gradient's running mean
    config.optim.b2 = 0.95  # of adamw: decay of the squared gradient's running mean
    config.optim.eps = 1e-8  # of adamw: added to the root of that mean
    config.optim.momentum = 0.9  # of sgd, lars and muon (0.95 is usual there)
    config.optim.trust_coefficient = 1e-3  # of lars
    config.optim.weight_decay = 0.05  # not on biases, norms and LayerScale
    config.optim.layer_decay = 1.0  # finetune: ratio of each block's learning rate to the next one's; 1: equal
    config.optim.clip_norm = 0.0  # > 0: clip the gradient to this global norm
    config.optim.clip_value = 0.0  # > 0: clip each value of the gradient to +- this
    config.optim.shard_state = False  # split parameters and optimizer state over mesh.data too (ZeRO-1)
    config.optim.grad_exchange = "float32"  # float32 | bfloat16: type in which devices sum gradients over mesh.data

    config.data = ConfigDict()
    # tfds | folder (image files where they are) | tar (WebDataset's) | parquet (Hugging Face's) | digits (8x8, come
    # with scikit-learn) | synthetic (procedural shapes)
    config.data.source = "tfds"
    config.data.name = "cifar10"  # TFDS data set; needs the feature image, and label to classify
    # Where TFDS keeps data sets, may be gs://…; "": $TFDS_DATA_DIR or ~/tensorflow_datasets. For folder, tar and
    # parquet the directory of the files; or several, separated by commas; a text file of paths; or a glob.
    config.data.data_dir = ""
    config.data.train_split = "train[:80%]"  # a name, with or without a slice; several are joined by "+"
    config.data.val_split = "train[80%:]"  # for evaluations during training; "": none
    config.data.test_split = "test"  # for pictures, and evaluated after the last step; "": none
    # folder: none | folders (a directory per class) | csv:FILE (path,label[,split]); tar: none | cls (a member .cls, or
    # "label" in .json); parquet: none | column:NAME
    config.data.labels = "none"
    config.data.val_fraction = 0.1  # folder, tar, parquet without val: fraction for "val", by a hash of the names
    config.data.dtype = "auto"  # of images: auto (as stored) | uint8 | uint16 | float32
    config.data.max_value = 0.0  # value that stands for 1 in files of more than 8 bits; 0: 65535, or 1 of float32
    config.data.background = 1.0  # not tfds: what transparent images are put over, 0 (black) to 1 (white)
    config.data.exif = True  # not tfds: turn photographs upright; TFDS sets are read as TensorFlow reads them
    config.data.max_pixels = 178_956_970  # of an image: larger ones, by their headers, count as undecodable
    config.data.accept_changes = False  # continue a run whose files have changed, from its next epoch on
    config.data.augment = "none"  # none | flip | crop_flip (random resized crop, bicubic, and flip)
    config.data.crop_scale = (0.2, 1.0)  # area of the random crop, as a fraction of the image
    config.data.randaug_magnitude = 0.0  # RandAugment after crop and flip: mean magnitude, up to 10 (paper: 9); 0: none
    config.data.randaug_std = 0.5  # of the magnitude, which is drawn for each operation
    config.data.randaug_layers = 2  # operations per image, each applied with probability 0.5
    config.data.repeats = 1  # copies of each image in a batch, augmented differently (repeated augmentation; DeiT: 3).
    # An epoch keeps its number of steps, so all images are seen once in `repeats` epochs.
    config.data.mean = (0.0,)  # model input = (pixel / 255 - mean) / std, or pixel / max_value; one per channel, or one
    config.data.std = (1.0,)  # mean and std (): as of init_from, or measured on 2,000 images at the first start
    config.data.cache = "auto"  # auto | memory (decode once) | stream (decode when read)
    config.data.cache_dir = ""  # decoded images and copies of records; "": mae_dist in $XDG_CACHE_HOME or ~/.cache
    config.data.stage = False  # copy the record files to cache_dir first and read them there; always done for a bucket
    config.data.num_workers = 0  # processes that prepare batches; 0: threads of this process
    config.data.max_bad_share = 0.0  # fraction of undecodable images that may be skipped
    config.data.num_examples = 10_000  # size of the synthetic training set
    config.data.num_classes = 10  # of the synthetic set

    config.eval = ConfigDict()
    config.eval.every_epochs = 1.0  # evaluate the validation split, and always at the end; 0: never
    config.eval.every_steps = 0  # > 0: an interval in steps instead
    config.eval.batch_size = 0  # examples per evaluation batch; 0: global_batch_size
    config.eval.test_at_end = True  # also evaluate the test split after the last step
    config.eval.train_at_end = False  # also the whole training split, without augmentation

    config.online = ConfigDict()  # pretraining: kNN and ridge accuracy of the encoder's features of whole images
    config.online.every_epochs = 10.0  # and always at the end; 0: never
    config.online.every_steps = 0  # > 0: an interval in steps instead
    config.online.num_train = 10_000  # training examples to compare with, the first of the split
    config.online.k = 20  # neighbours that vote (Wu et al. 2018)
    config.online.temperature = 0.07  # a vote counts exp(cosine similarity / temperature)
    config.online.ridge = 1e-3  # penalty of the regression of one-hot labels, per example's squared error

    config.pictures = ConfigDict()  # original, masked, reconstruction, reconstruction with visible patches
    config.pictures.every_epochs = 10.0  # and always at the end; 0: never
    config.pictures.every_steps = 0  # > 0: an interval in steps instead
    config.pictures.num_images = 8  # the first of the test split
    # With norm_pix_loss the model does not predict the mean and standard deviation of removed patches. Pictures take
    # them from the removed patches themselves ("true", which flatters the model) or from visible ones ("visible").
    config.pictures.pix_stats = "true"
    config.pictures.channels = ()  # three, from 0, to show as red, green and blue; (): the first three, or one
    config.pictures.stretch = "auto"  # auto (not for uint8) | none | percentile: 2 % to 98 % of each image's values

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # and always at the end; 0: by minutes only
    config.checkpoint.every_minutes = 10.0  # at the first log step this long after the last save; 0: by steps only
    config.checkpoint.keep_latest = 2  # how many of the newest checkpoints are kept
    config.checkpoint.keep_every_steps = 0  # > 0, a multiple of every_steps: keep all checkpoints at its multiples
    config.checkpoint.keep_best = ""  # save every evaluated step, keep the best by val_loss, val_top1, val_knn_top1, …
    config.checkpoint.retries = 3  # of a failed save, after 1, 4 and 16 s; several processes restart instead

    config.deadlines = ConfigDict()  # seconds without progress after which a process ends ("stalled"); 0: never
    config.deadlines.start_secs = 1800.0  # each of joining, opening data, restoring, compiling
    config.deadlines.step_secs = 600.0  # for one step, or writing a profile
    config.deadlines.data_secs = 600.0  # waiting for one batch
    config.deadlines.checkpoint_secs = 1800.0  # as long as a save keeps training waiting
    config.deadlines.evaluate_secs = 1800.0  # for one batch
    config.deadlines.peer_secs = 60.0  # since another process's last heartbeat ("peer lost")

    return config.lock()
