"""What a client does: train on its own data; and the machine it does it on."""
