# A row of Table 6: 313 G, 67.6 APb50, 41.6 APm.
_base_ = "./mask-rcnn_hatnet-s_fpn_1x_coco.py"
model = dict(backbone=dict(grid_sizes=[8, 8, 8], pool_sizes=[12, 6, 3]))
