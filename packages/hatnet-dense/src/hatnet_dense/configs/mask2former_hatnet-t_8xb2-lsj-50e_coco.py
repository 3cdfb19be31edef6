_base_ = ["./_base_/mask2former.py", "./_base_/hatnet-t.py"]
model = dict(backbone=_base_.backbone, panoptic_head=dict(in_channels=_base_.channels))
