"""Networks by torch and timm alone, without nnU-Net: the one of the paper, PVT-V2-B2 and EMCAD.

- :mod:`~nnunet_lomix.networks.alignment`: outputs that fit an image of any size;
- :mod:`~nnunet_lomix.networks.pvt`: the encoder and its pretrained weights;
- :mod:`~nnunet_lomix.networks.emcad`: the decoder, and the whole.

The first one imports no timm, which takes a second; whoever needs a network imports the others where it is built.
"""
