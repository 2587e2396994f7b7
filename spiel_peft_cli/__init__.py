"""The command `spiel-peft`.

A package of its own, because importing anything from `spiel_peft` imports torch, which takes seconds: help and usage
errors answer at once. What the commands do is in `spiel_peft`, imported when a command runs.
"""
