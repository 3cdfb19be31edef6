# A row of Table 6: 309 G, 67.5 APb50, 41.3 APm.
_base_ = "./mask-rcnn_hatnet-s_fpn_1x_coco.py"
model = dict(backbone=dict(grid_sizes=[16, 16, 8], pool_sizes=[16, 8, 4]))
