"""A mend for FedOpt in NVFlare 2.9: its server must optimize the model that the sites were given.

NVFlare's server-side optimizer steps the weights of the model component, which are random, while the sites receive the
checkpoint: the first aggregate would then be the random weights plus the sites' change to other ones.
"""

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.widgets.widget import Widget


class StartFromCheckpoint(Widget):
    """Copies the global model into the server's model component once it is loaded; the optimizer holds that one."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.INITIAL_MODEL_LOADED:
            weights = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS]
            model = fl_ctx.get_engine().get_component("model")
            model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
