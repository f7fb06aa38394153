"""Cost of an update of the average: beside one lerp over as many numbers in one piece, and beside torch's,
timm's and Lightning's; and of a training batch"""
import warnings
from functools import partial
from time import perf_counter
from types import SimpleNamespace
warnings.filterwarnings('ignore')

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet50, vit_l_16
from fastai_callbacks_ext.all import EMA, LAWA, SWA
from gradients import memory
from harness import measure, on_device, options, ratio, report, sync
from loop import NETS, fastai, net, seconds

LERP = 'one lerp of a flat buffer'
def mlp(): return nn.Sequential(*(nn.Linear(2236, 2236) for _ in range(5)))
MODELS = {'MLP of 25 M parameters in 10 tensors': mlp,
          'ResNet-50, 25.6 M parameters in 161 tensors': resnet50}

def repeated(make, model, device, n=10):
    "Seconds of one update, the mean of `n`; model and average are new each time: where they lie matters"
    with torch.device(device): update = make(model())
    update()
    sync()
    start = perf_counter()
    for _ in range(n): update()
    sync()
    return (perf_counter()-start)/n

def flat(model):
    n,device = sum(p.numel() for p in model.parameters()),next(model.parameters()).device
    average,weights = (torch.rand(n, device=device) for _ in range(2))
    return lambda: average.lerp_(weights, 1e-3)

def foreach(model):
    weights = [p.detach() for p in model.parameters()]
    averages = [p.clone() for p in weights]
    return lambda: torch._foreach_lerp_(averages, weights, 1e-3)

def ours(model, buffers):
    ema = EMA(0.999, buffers=buffers)
    ema._learner = SimpleNamespace(model=model)
    return torch.no_grad()(ema._update)

def torchs(model):
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return partial(averaged.update_parameters, model)

def timms(model):
    from timm.utils import ModelEmaV3
    return partial(ModelEmaV3(model, decay=0.999).update, model)

def lightnings(model):
    "The update of Lightning's callback at the end of a step"
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging
    module,callback = LightningModule(),EMAWeightAveraging(decay=0.999)
    module.model = model
    callback.setup(SimpleNamespace(), module, 'fit')
    return lambda: callback._average_model.update_parameters(module)

STEPS = {
    'plain fastai': list, 'EMA()': lambda: [EMA()], 'EMA(every=10)': lambda: [EMA(every=10)],
    'SWA(every=10)': lambda: [SWA(every=10, buffers='copy')], 'LAWA(every=10)': lambda: [LAWA(every=10)]}

COPIES = {
    'EMA()': lambda: [EMA()], 'EMA([0.9, 0.99])': lambda: [EMA([0.9, 0.99])],
    'SWA(0.)': lambda: [SWA(0., every=1)], 'LAWA(5)': lambda: [LAWA(5, every=1)]}

def main():
    args = options(__doc__, device=True).parse_args()
    tables = {}
    updates = {LERP: flat, '_foreach_lerp_ on lists that are kept': foreach,
               "EMA(), buffers='copy'": partial(ours, buffers='copy'),
               'EMA()': partial(ours, buffers='average'),
               "torch's AveragedModel": torchs, "timm's ModelEmaV3": timms,
               "Lightning's EMAWeightAveraging": lightnings}
    models = MODELS | ({'ViT-L/16, 304 M parameters in 296 tensors': vit_l_16} if args.device=='cuda' else {})
    for title,model in models.items():
        cases = {k: partial(repeated, f, model, args.device) for k,f in updates.items()}
        tables[title] = measure(cases, args.rounds, 'ms an update')
    for title in list(NETS)[:2]:
        steps = {k: partial(seconds, partial(fastai, cbs=cbs, bar=False), net(title, args.device))
                 for k,cbs in STEPS.items()}
        tables[f'A training batch. {title}'] = measure(steps, args.rounds, 'µs a batch')
    results = report(on_device('averaging', args.device), tables, args.rounds, args.device,
                     packages=('timm','lightning'), copies=memory(COPIES))
    print('\nCopies of the model in memory:', results['copies'])
    print('\nTargets: at most 1.1 x one lerp (on a GPU 1.6 and 1.2); at most 1 x each peer')
    for title in models:
        name,rows = title.split(',')[0],list(tables[title]['rows'])
        for row in rows[4:]: print(f"{ratio(results, title, 'EMA()', row):.2f}  EMA() / {row} ({name})")
        over = [ratio(results, title, row) for row in (rows[2], 'EMA()')]
        print(f'{over[0]:.2f}  over one lerp, {over[1]:.2f} with buffers')

if __name__=='__main__': main()
