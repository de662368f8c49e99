"""Vision backbones and what is trained of them: whole networks, adapters, heads on frozen features."""
