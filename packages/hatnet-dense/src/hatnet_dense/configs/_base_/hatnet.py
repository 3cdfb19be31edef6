# What every config here needs beside those of MMDetection and MMSegmentation.
custom_imports = dict(imports=["hatnet_dense.register"], allow_failed_imports=False)
custom_hooks = [dict(type="PlainCheckpointHook"), dict(type="DataCheckHook")]
