"""The model under DeepSpeed: configuration, engine, partitioned state, moving average."""
