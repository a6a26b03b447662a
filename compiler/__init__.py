"""Typed tree to kernel plan to Triton source. Imports `attnc.dsl`; never torch, triton or the runtime."""
