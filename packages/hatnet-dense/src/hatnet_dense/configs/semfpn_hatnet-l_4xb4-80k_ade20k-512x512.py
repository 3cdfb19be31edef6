_base_ = "./semfpn_hatnet-t_4xb4-80k_ade20k-512x512.py"
checkpoint = "https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Large.pth"
model = dict(
    backbone=dict(
        variant="hatnet_large",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[64, 128, 320, 640]),
)
