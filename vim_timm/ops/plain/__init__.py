"""Backends of plain aten: `reference`, the law; `torch`, in chunks; `export`, a traceable graph; `ssd`, its forms."""
