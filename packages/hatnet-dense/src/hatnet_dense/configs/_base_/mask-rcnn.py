# Sec. 4.3 and Table 4. What the paper leaves open follows PVT, as it says: weight decay, no gradient clipping.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "./hatnet.py",
]
model = dict(backbone=dict(_delete_=True, type="HATNetBackbone"))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, weight_decay=1e-4))
