# What the two detectors of the drawn shapes share. The variable SHAPES names the folder that draw.py wrote.
classes = ("disk", "square", "triangle")
metainfo = dict(classes=classes, palette=[(220, 20, 60), (0, 120, 255), (60, 180, 75)])
resize = dict(type="Resize", scale=(160, 128), keep_ratio=True)
annotations = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
drawn_train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root="{{$SHAPES:data/shapes}}/",
        metainfo=metainfo,
        pipeline=[
            dict(type="LoadImageFromFile"),
            annotations,
            resize,
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackDetInputs"),
        ],
    ),
)
drawn_val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root="{{$SHAPES:data/shapes}}/",
        metainfo=metainfo,
        pipeline=[
            dict(type="LoadImageFromFile"),
            resize,
            annotations,
            dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
        ],
    ),
)
drawn_evaluator = dict(ann_file="{{$SHAPES:data/shapes}}/annotations/instances_val2017.json")
drawn_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=1))
