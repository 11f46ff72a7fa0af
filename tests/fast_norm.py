"""The tests' decoders have the norm that ours has on a GPU.

On a CPU torch takes the norm of a few channels, which do not lie beside each other, as slowly as all else in a tiny
decoder together. `diffusers_norm` gives a test that of diffusers back.
"""

from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from astrolabe_diffusers.models.vae_streaming import FusedWanRMSNorm


diffusers_forward = WanRMS_norm.forward
WanRMS_norm.forward = FusedWanRMSNorm.forward
