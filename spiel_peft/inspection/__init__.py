"""Looking into adapters that lie on disk: what they hold, whether it is sound, and pictures of it."""

from .facts import AdapterFacts, Close, ModuleFacts, adapter_facts, read_closes
from .validate import Finding, validate_adapter

__all__ = ["AdapterFacts", "Close", "Finding", "ModuleFacts", "adapter_facts", "read_closes", "validate_adapter"]
