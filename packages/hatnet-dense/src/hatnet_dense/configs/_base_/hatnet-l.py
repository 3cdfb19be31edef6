# HAT-Net-Large: the backbone, and its channels for the neck or head that reads them.
backbone = dict(
    variant="hatnet_large",
    drop_path_rate=0.3,
    init_cfg=dict(
        type="Pretrained",
        checkpoint="https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Large.pth",
    ),
)
channels = [64, 128, 320, 640]
