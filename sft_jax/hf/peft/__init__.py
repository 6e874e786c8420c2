"""Adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors in one directory."""
