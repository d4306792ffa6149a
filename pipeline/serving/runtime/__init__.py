"""What runs a registered model. It is stored with each and loaded from there, so it imports nothing of this project.

Inside, imports are relative: here it is pipeline.serving.runtime, beside a model it has a name of that model alone.
"""

from .classifier import Answer as Answer
from .classifier import Classifier as Classifier
from .programs import Placement as Placement
from .programs import RoutedNetwork as RoutedNetwork
