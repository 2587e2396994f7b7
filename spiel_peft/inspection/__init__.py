"""Inspects adapters on disk: what they hold, whether their files are sound, and pictures of them."""

from .facts import AdapterFacts, Close, ModuleFacts, adapter_facts, read_closes
from .validate import Finding, validate_adapter

__all__ = ["AdapterFacts", "Close", "Finding", "ModuleFacts", "adapter_facts", "read_closes", "validate_adapter"]
