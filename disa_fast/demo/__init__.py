"""A small MAR trained on Fashion-MNIST, shipped with the package: something to draw with on any machine."""
