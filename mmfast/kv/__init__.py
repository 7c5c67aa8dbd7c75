"""The multimodal KV cache: bookkeeping of layers that store fewer tokens than the user passed."""
