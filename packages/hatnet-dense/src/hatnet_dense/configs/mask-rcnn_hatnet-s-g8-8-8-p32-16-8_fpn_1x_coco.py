# A row of Table 6: 291 G, 66.8 APb50, 41.0 APm.
_base_ = "./mask-rcnn_hatnet-s_fpn_1x_coco.py"
model = dict(backbone=dict(grid_sizes=[8, 8, 8], pool_sizes=[32, 16, 8]))
