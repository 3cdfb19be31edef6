# HAT-Net-Small: the backbone, and its channels for the neck or head that reads them.
backbone = dict(
    variant="hatnet_small",
    drop_path_rate=0.1,
    init_cfg=dict(
        type="Pretrained",
        checkpoint="https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Small.pth",
    ),
)
channels = [64, 128, 320, 512]
