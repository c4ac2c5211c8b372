"""Backends of plain aten: `reference`, the law; `torch`, in chunks; `export`, the chunks as a traceable graph."""
