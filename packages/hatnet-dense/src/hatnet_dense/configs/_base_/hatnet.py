# Registration and hooks of this package, in every config.
custom_imports = dict(imports=["hatnet_dense.register"], allow_failed_imports=False)
custom_hooks = [dict(type="PlainCheckpointHook"), dict(type="DataCheckHook")]
