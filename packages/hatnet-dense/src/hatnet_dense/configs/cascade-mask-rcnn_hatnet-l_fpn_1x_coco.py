_base_ = ["./_base_/cascade-mask-rcnn.py", "./_base_/hatnet-l.py"]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
