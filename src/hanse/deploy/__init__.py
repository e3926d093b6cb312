"""Real federations on Flower's deployment engine: keys, certificates, and the app that ``flwr run`` takes."""
