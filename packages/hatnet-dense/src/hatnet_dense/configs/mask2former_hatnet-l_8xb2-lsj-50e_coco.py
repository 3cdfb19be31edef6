_base_ = "./mask2former_hatnet-t_8xb2-lsj-50e_coco.py"
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Large.pth"
model = dict(
    backbone=dict(
        variant="hatnet_large",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    panoptic_head=dict(in_channels=[64, 128, 320, 640]),
)
