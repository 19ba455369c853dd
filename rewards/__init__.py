"""Rewards: answer checking, format, language and length, the registry of reward functions, and their killable workers.

Imports neither torch nor anything of `grpo` and `nsa`; workers start in tenths of a second. README.md has the API.
"""
