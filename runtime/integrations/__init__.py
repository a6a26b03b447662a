"""Bridges to other libraries: one module each, imported under `attnc.integrations`."""
