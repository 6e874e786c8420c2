"""Hugging Face directories in and out: safetensors, the table of names, loading, saving, and the check after export."""
