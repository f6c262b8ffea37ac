"""What others call our settings: names that are near in meaning and not in spelling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

_OTHERS: Mapping[str, str] = {
    # a training
    "epochs": "epoch num_epochs n_epochs nb_epochs max_epochs num_train_epochs total_epochs",
    "lr": "learning_rate base_lr blr max_lr peak_lr initial_lr lr0",
    "min_lr": "lr_min eta_min final_lr",
    "weight_decay": "wd decay l2 optimizer_weight_decay",
    "batch_size": "batch bs batchsize train_batch_size per_device_train_batch_size micro_batch_size",
    "accumulate": "accum_iter grad_accum grad_accum_steps gradient_accumulation_steps accumulate_grad_batches",
    "optimizer": "opt optim",
    "schedule": "sched scheduler lr_scheduler lr_schedule lr_scheduler_type lr_policy",
    "warmup_epochs": "warmup warmup_steps warmup_iters warmup_ep lr_warmup lr_warmup_epochs",
    "layer_decay": "llrd layerwise_lr_decay layer_wise_lr_decay",
    "clip": "clip_grad grad_clip max_grad_norm max_norm gradient_clip_val gradient_clipping",
    "smoothing": "label_smoothing label_smoothing_factor",
    "mixup": "mixup_alpha mix_up",
    "cutmix": "cutmix_alpha cut_mix",
    "drop_path": "drop_path_rate stochastic_depth dpr",
    "ema": "ema_decay model_ema model_ema_decay weight_averaging",
    "precision": "amp fp16 bf16 dtype mixed_precision half",
    "augment": "aug augmentation augmentations transforms",
    "evaluate_every": "eval_every eval_interval eval_steps val_interval validate_every check_val_every_n_epoch",
    "save_minutes": "checkpoint_minutes checkpoint_every checkpoint_interval checkpointing save_every save_interval save_steps",
    "keep_checkpoints": "save_total_limit max_checkpoints num_checkpoints save_top_k",
    "zero": "zero_stage zero_optimization stage",
    "compile": "torch_compile torchcompile use_compile",
    "freeze": "frozen freeze_layers freeze_blocks",
    "probe_epochs": "linear_probe_epochs head_epochs",
    "teacher_weight": "distillation_alpha distill_alpha kd_weight alpha",
    "temperature": "distillation_tau tau kd_temperature",
    "distill": "distillation_type distillation kd_loss",
    "guests": "callbacks callback hooks plugins",
    # what is looked at, and what ships
    "keep": "ratio fraction amount sparsity prune_ratio pruning_ratio keep_ratio budget",
    "pick": "picker policy strategy sampler selection_method",
    "criterion": "importance saliency",
    "round": "round_to channel_multiple divisor",
    "exclude": "ignore ignored_layers skip",
    "int8": "quantize quantization quant",
    "proxy": "probe surrogate",
    # places of one setting alone
    "data.path": "dir root data_dir data_path data_root dataset_path",
    "data.name": "dataset dataset_name",
    "data.workers": "num_workers n_workers dataloader_num_workers threads",
    "data.normalize": "mean std normalization",
    "data.crop": "crop_pct center_crop",
    "data.options.val_fraction": "val_split val_fraction val_ratio validation_split",
    "model.name": "arch architecture model_name backbone",
    "model.weights": "checkpoint ckpt checkpoint_path initial_checkpoint resume pretrained_weights init",
    "model.args.img_size": "img_size image_size input_size side resolution",
    "model.args.patch_size": "patch_size",
    "model.args.depth": "num_layers depth num_hidden_layers",
    "model.args.embed_dim": "embed_dim hidden_size hidden_dim width",
    "model.args.num_heads": "num_heads n_heads heads num_attention_heads",
    "folder": "out output output_dir out_dir outdir save_dir log_dir run_dir",
    "seed": "random_seed random_state manual_seed",
    "device": "gpu gpus cuda accelerator",
}  # fmt: skip
"""Our setting -> what others call it. One with a dot stands there alone; others wherever a section has them."""

MEANT: Mapping[str, str] = {theirs: ours for ours, names in _OTHERS.items() for theirs in names.split()}


_TOPS = ("train", "prune", "select", "export", "data", "model")
"""Where a name without a section is looked for, in this order."""


def meant(place: Sequence[str], is_setting: Callable[[str], bool]) -> str:
    """The setting that somebody means who knows it by another name, or without its section; empty where nobody can tell.

    Args:
        place: of what was said, a name a section and its own
        is_setting: whether there is one of this name, dots and all
    """
    *section, name = place
    ours = MEANT.get(name, name)
    if "." in ours:
        return ours
    wanted = (".".join((*section, ours)), ours, *(f"{top}.{ours}" for top in _TOPS if not section))
    return next((one for one in wanted if is_setting(one)), "")


def elsewhere(place: Sequence[str], is_setting: Callable[[str], bool]) -> str:
    """The setting of another section that is called as the last of ``place``; see :func:`meant`."""
    return next((one for top in _TOPS if is_setting(one := f"{top}.{MEANT.get(place[-1], place[-1])}")), "")
