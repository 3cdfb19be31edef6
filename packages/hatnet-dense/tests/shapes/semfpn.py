# Semantic FPN on the drawn shapes, from scratch, small enough for two cores. The variable SHAPES names the folder that
# draw.py wrote.
_base_ = ["../../src/hatnet_dense/configs/semfpn_hatnet-t_4xb4-80k_ade20k-512x512.py"]
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(init_cfg=None, drop_path_rate=0.0),
    neck=dict(norm_cfg=dict(type="GN", num_groups=32)),  # as MMDetection's own configs for training from scratch
    decode_head=dict(num_classes=4),
)
dataset = dict(
    type="BaseSegDataset",  # ADE20KDataset with other classes than its 150
    data_root="{{$SHAPES:data/shapes}}/",
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
    metainfo=dict(
        classes=("photograph", "disk", "square", "triangle"),
        palette=[[90, 90, 90], [220, 20, 60], [0, 120, 255], [60, 180, 75]],
    ),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(161, 128), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(161, 128), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, dataset=dict(**dataset, pipeline=train_pipeline)
)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=400, max_keep_ckpts=1))
randomness = dict(seed=0)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_cfg = dict(max_iters=400, val_interval=400)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type="PolyLR", power=0.9, eta_min=0.0, begin=30, end=400, by_epoch=False),
]
