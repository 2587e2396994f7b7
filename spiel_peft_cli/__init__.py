"""The command `spiel-peft`.

A package of its own, because importing anything from `spiel_peft` imports torch, which takes seconds: help and usage
errors appear at once. The work of a command is in `spiel_peft`, which is imported when the command runs.
"""
