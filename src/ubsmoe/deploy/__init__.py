"""What runs a federation on Flower: the app's folder, keys, and a federation on this machine to try it with."""
