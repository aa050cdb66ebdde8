from .adapter import Adapter as Adapter
from .dit import DiT as DiT
from .mlp import TimeMLP as TimeMLP
from .plain import PlainMLP as PlainMLP
from .unet import UNet as UNet
