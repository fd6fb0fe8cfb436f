"""Every field with its default and meaning: a complete, if small, configuration by itself.

The files in `configs/` change it, and `--config.a.b=value` changes them. Imports nothing of mae_dist.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the default configuration, locked: a field that is not named here is an error."""
    config = ConfigDict()

    config.name = "default"  # names the run: the workdir is runs/<name> unless --workdir says otherwise
    config.task = (
        "pretrain"  # pretrain | probe (frozen encoder) | finetune (all weights; from scratch without init_from)
    )
    config.imports = ()  # modules of yours that register tasks, masking strategies, sources, optimizers, augmentations
    config.init_from = ""  # trained weights to start from: a workdir, what convert wrote, Hugging Face's or timm's
    config.seed = 0  # decides everything random: initial weights, order of the data, augmentation, masks, dropout

    config.total_epochs = 100.0  # passes over the training split
    config.total_steps = 0  # > 0: this many updates instead; the warm-up shrinks or grows in proportion
    config.global_batch_size = 256  # examples per update, over all devices and processes
    config.accum_steps = 1  # an update's batch is computed in this many pieces, one after another
    config.ema_decay = 0.0  # > 0: a moving average of the parameters, which is evaluated and handed on in their place
    config.log_every_steps = 50  # metrics are fetched from the device and written this often
    config.trace = False  # record digests of each update's images and masks, to compare runs
    config.profile_steps = ""  # "10:15": a profiler's trace of updates 10 to 15, in profile/; SIGUSR1: of the next five
    config.max_skipped_steps = 20  # stop ("diverged") after this many updates in a row with a non-finite gradient

    config.cpu = ConfigDict()  # without an accelerator; 0, auto: chosen for this machine, and kept with the run
    config.cpu.devices = 0  # the cores are used as so many devices; 0: one per core, as far as batches divide
    config.cpu.pieces = 0  # a device's share of an update is computed in so many pieces; 0: as fit its cache
    config.cpu.products = "auto"  # "onednn" or "xla" computes products of float32; auto: what suits model and cores
    config.cpu.fold = True  # norms' scales and LayerScale go into the weights once an update, not into every token

    config.mesh = ConfigDict()  # devices = data x fsdp x tensor; one of them may be -1: whatever is left
    config.mesh.data = -1  # copies of the model, each with its share of the batch
    config.mesh.fsdp = 1  # parameters and optimizer state split over these devices, which also share the batch
    config.mesh.tensor = 1  # attention heads and MLP width split over these devices

    config.model = ConfigDict()
    config.model.image_size = (32, 32)  # (height, width) in pixels; other images are resized to it
    config.model.channels = 3  # 1 gray, 3 RGB, 4 RGBA
    config.model.patch_size = (4, 4)  # (height, width) of a patch; divides image_size
    config.model.embed_dim = 128  # encoder width
    config.model.depth = 3  # encoder blocks
    config.model.num_heads = 4  # encoder attention heads; divides embed_dim
    config.model.mlp_ratio = 2.0  # encoder MLP width / embed_dim
    config.model.decoder_embed_dim = 64
    config.model.decoder_depth = 1
    config.model.decoder_num_heads = 4
    config.model.decoder_mlp_ratio = 2.0
    config.model.mask_ratio = 0.75  # share of patches removed; int(patches * (1 - mask_ratio)) are kept
    config.model.masking = "random"  # random (per example) | grid (regular) | block (rectangles) | user (mask_file)
    config.model.mask_file = ""  # for user: .npy (rows, columns) of patches, 1 = removed; decides the ratio
    config.model.cls_token = "learned"  # learned | zero | none
    config.model.mask_token = "learned"  # learned | zero
    config.model.pos_embed = "sincos2d"  # sincos2d (the paper's) | sincos1d (the report's) | learned
    config.model.layer_scale_init = 0.0  # initial value of LayerScale; 0: no LayerScale
    config.model.norm_eps = 1e-6  # of every LayerNorm: the paper's code; Hugging Face's default is 1e-12
    config.model.drop_path = 0.0  # stochastic depth of the last encoder block, rising linearly from 0
    config.model.dropout = 0.0
    config.model.qkv_bias = True
    config.model.gelu = "exact"  # exact | tanh (its approximation)
    config.model.dtype = "float32"  # compute: float32 | bfloat16; parameters, softmax, norms and loss stay float32
    config.model.scan = False  # compile one block and loop over it: much faster compilation for deep models
    config.model.remat = (
        "none"  # recompute in the backward pass: none | dots (keep products) | blocks (keep inputs only)
    )

    config.pretrain = ConfigDict()
    config.pretrain.norm_pix_loss = False  # target: each patch normalised to mean 0, variance 1

    config.classify = ConfigDict()  # for probe and finetune
    config.classify.head = "linear"  # linear | mlp (one hidden layer)
    config.classify.hidden_dim = 128  # of the mlp head
    config.classify.pool = "gap"  # gap (mean over patches) | cls (class token); of online too
    config.classify.norm_after_pool = False  # True: a new LayerNorm of what was pooled instead of the encoder's last
    config.classify.batch_norm = False  # probe: a BatchNorm without scale and bias before the head, as in the paper's
    config.classify.label_smoothing = 0.0
    config.classify.mixup = 0.0  # finetune: alpha of mixup, each image with its neighbour in the batch; the paper: 0.8
    config.classify.cutmix = 0.0  # finetune: alpha of cutmix; the paper: 1.0
    config.classify.mix_prob = 1.0  # share of the images that are mixed, if any are
    config.classify.mix_switch_prob = 0.5  # share of cutmix among them, where there are both
    config.classify.erase_prob = 0.0  # finetune: share of the images with a random box of noise; the paper: 0.25

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw | sgd (momentum) | lars (sgd with one trust ratio per array and block)
    config.optim.base_lr = 1e-3  # peak learning rate = base_lr * global_batch_size / 256
    config.optim.schedule = "cosine"  # cosine | constant, after the warm-up
    config.optim.final_lr = 0.0  # where the cosine ends
    config.optim.warmup_epochs = 20.0  # linear warm-up from 0; at most total_epochs
    config.optim.b1 = 0.9
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9  # of sgd and lars
    config.optim.trust_coefficient = 1e-3  # of lars
    config.optim.weight_decay = 0.05  # not on biases, norms and LayerScale
    config.optim.layer_decay = 1.0  # finetune: the learning rate of each block is that of the next times this; 1: equal
    config.optim.clip_norm = 0.0  # > 0: scale the gradient down to this global norm
    config.optim.clip_value = 0.0  # > 0: clip every component of the gradient to +- this

    config.data = ConfigDict()
    config.data.source = "tfds"  # tfds | digits (8x8, comes with scikit-learn) | synthetic (procedural shapes)
    config.data.name = "cifar10"  # TFDS data set; needs the features image and label
    config.data.data_dir = ""  # where TFDS keeps data sets, may be gs://…; "": $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.data.train_split = "train[:80%]"
    config.data.val_split = "train[80%:]"
    config.data.test_split = "test"
    config.data.augment = "none"  # none | flip | crop_flip (random resized crop, bicubic, and flip)
    config.data.crop_scale = (0.2, 1.0)  # area of the random crop, as a share of the image
    config.data.randaug_magnitude = 0.0  # RandAugment after crop and flip: mean strength, up to 10 (paper: 9); 0: none
    config.data.randaug_std = 0.5  # of the strength, drawn for each operation
    config.data.randaug_layers = 2  # operations drawn for an image, each applied half of the time
    config.data.repeats = 1  # copies of each image in a batch, augmented differently; an epoch stays as many updates,
    # so that all images are seen once in `repeats` epochs (repeated augmentation; DeiT: 3)
    config.data.mean = (0.0,)  # model input = (pixel / 255 - mean) / std; one value, or one per channel
    config.data.std = (1.0,)
    config.data.cache = "auto"  # auto | memory (decode once) | stream (decode when read)
    config.data.cache_dir = ""  # where decoded images and copies are kept; "": $XDG_CACHE_HOME or ~/.cache, mae_dist
    config.data.stage = False  # copy the record files to cache_dir first and read them there; from a bucket always
    config.data.num_workers = 0  # processes that prepare batches; 0: threads of this one
    config.data.max_bad_share = 0.0  # share of undecodable images that may be skipped
    config.data.num_examples = 10_000  # size of the synthetic training set
    config.data.num_classes = 10  # of the synthetic set

    config.eval = ConfigDict()
    config.eval.every_epochs = 1.0  # evaluate the validation split, and always at the end; 0: never
    config.eval.every_steps = 0  # > 0: this many updates instead
    config.eval.batch_size = 0  # examples per evaluation batch; 0: global_batch_size
    config.eval.test_at_end = True  # also evaluate the test split after the last update
    config.eval.train_at_end = False  # and the whole training split, as it is: `top1` in the log is one batch's

    config.online = ConfigDict()  # of a pretraining: accuracy of the encoder so far, by its features of whole images
    config.online.every_epochs = 10.0  # by neighbours and by ridge regression, and always at the end; 0: never
    config.online.every_steps = 0  # > 0: this many updates instead
    config.online.num_train = 10_000  # the first so many training examples are compared with
    config.online.k = 20  # neighbours that vote (Wu et al. 2018) ...
    config.online.temperature = 0.07  # ... with exp(cosine similarity / temperature) each
    config.online.ridge = 1e-3  # penalty of the regression of one-hot labels, for each example's squared error

    config.pictures = ConfigDict()  # original, masked, reconstruction, reconstruction with visible patches
    config.pictures.every_epochs = 10.0  # and always at the end; 0: never
    config.pictures.every_steps = 0  # > 0: this many updates instead
    config.pictures.num_images = 8  # the first of the test split
    # With norm_pix_loss the model does not predict the means and deviations of removed patches. The pictures take these
    # from the removed patches themselves ("true", which flatters the model) or from visible ones near by ("visible").
    config.pictures.pix_stats = "true"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # and always at the end; 0: by minutes only
    config.checkpoint.every_minutes = 10.0  # at the first log step this long after the last; 0: by steps only
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_every_steps = 0  # > 0, a multiple of every_steps: also keep its multiples for ever
    config.checkpoint.keep_best = ""  # save every evaluated step, keep the best by val_loss, val_top1, val_knn_top1, …
    config.checkpoint.retries = 3  # of a save that failed, after 1, 4 and 16 s; of several processes: by a restart

    config.deadlines = ConfigDict()  # seconds without progress after which a process ends ("stalled"); 0: never
    config.deadlines.start_secs = 1800.0  # joining, opening data, restoring, compiling: each
    config.deadlines.step_secs = 600.0
    config.deadlines.data_secs = 600.0  # waiting for one batch
    config.deadlines.checkpoint_secs = 1800.0
    config.deadlines.evaluate_secs = 1800.0  # for one batch
    config.deadlines.peer_secs = 60.0  # after another process's last sign of life ("peer lost")

    return config.lock()
