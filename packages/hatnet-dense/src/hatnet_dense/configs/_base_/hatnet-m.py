# HAT-Net-Medium: the backbone, and its channels for the neck or head that reads them.
backbone = dict(
    variant="hatnet_medium",
    drop_path_rate=0.3,
    init_cfg=dict(
        type="Pretrained",
        checkpoint="https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Medium.pth",
    ),
)
channels = [64, 128, 320, 512]
