"""HAT-Net as a backbone for MMDetection and MMSegmentation; importing this registers ``HATNetBackbone``."""

from hatnet_dense.__about__ import __version__
from hatnet_dense.backbone import HATNetBackbone

__all__ = ["HATNetBackbone", "__version__"]
