"""Time of a training batch with what makes it faster, over a bare PyTorch loop with torch's fused Adam

The batches lie on the device before the clock starts. ResNets need torchvision, and are left out without it.
"""
import os, tempfile, warnings
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from time import perf_counter
warnings.filterwarnings('ignore')

import torch
from fastai.basics import Adam, DataLoaders, Learner, OptimWrapper, default_device
from fastai.callback.fp16 import MixedPrecision
from torch import nn
from fastai_callbacks_ext.all import *
from fastai_callbacks_ext.test_utils import digits_model
from harness import apart, measure, on_device, options, report, sync

Fused = partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
loss_func = nn.CrossEntropyLoss()

class Net:
    "A network, with `n` batches of random numbers"
    def __init__(self, model, n, shape, bf16=False, n_classes=10):
        self.model,self.n,self.shape,self.bf16,self.n_classes = model,n,shape,bf16,n_classes

    def to(self, device):
        torch.manual_seed(0)
        batch = lambda: (torch.randn(self.shape, device=device),
                         torch.randint(self.n_classes, self.shape[:1], device=device))
        self.device,self.batches = torch.device(device),[batch() for _ in range(self.n)]
        return self

    def new(self):
        torch.manual_seed(0)
        return self.model().to(self.device)

def mlp(): return nn.Sequential(nn.Linear(30,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,2))

def nets(device):
    gpu = device=='cuda'
    res = {'Tiny net: MLP 30-32-32-2, 64 rows': Net(mlp, 1000, (64,30), n_classes=2),
           'Digits: CNN of 6,000 parameters, 64 images of 8 px': Net(digits_model, 300, (64,1,8,8))}
    if not find_spec('torchvision'): return res
    from torchvision.models import resnet18, resnet50
    big = Net(partial(resnet50, num_classes=10), 12, (64,3,224,224), bf16=True)
    small = Net(partial(resnet18, num_classes=10), 30 if gpu else 6, (32,3,64,64))
    res['ResNet-18, 32 images of 64 px'] = small
    return res | ({'ResNet-50, bfloat16, 64 images of 224 px': big} if gpu else {})

class Batches:
    "A loader that notes when each epoch starts"
    def __init__(self, batches): self.batches,self.starts = batches,[]
    def __len__(self): return len(self.batches)
    def __iter__(self):
        sync()
        self.starts.append(perf_counter())
        return iter(self.batches)

def bare(net, batches, epochs, opt_func=partial(torch.optim.Adam, fused=True)):
    model = net.new()
    opt = opt_func(model.parameters(), lr=1e-3)
    precision = lambda: torch.autocast(net.device.type, torch.bfloat16) if net.bf16 else nullcontext()
    for _ in range(epochs):
        for x,y in batches:
            with precision(): loss = loss_func(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()

def fastai(net, batches, epochs, cbs=list, opt_func=Adam):
    cbs = cbs()+([MixedPrecision(amp_mode='bf16')] if net.bf16 else [])
    learn = Learner(DataLoaders(batches, []), net.new(), loss_func, opt_func=opt_func, cbs=cbs)
    learn.fit(epochs, 1e-3)

def ten():
    "Ten callbacks that a careful user has on"
    folder,raw = tempfile.mkdtemp(),dict(validate='raw', final='raw')    # batch norm would be refreshed
    return [TerminateOnNaN(every=20), EMA(.999, **raw), GradientClip(1.), GradientCentralization(),
            StepLimit(10**7), TimeLimit(minutes=99), StopFile(os.path.join(folder, 'stop')),
            EarlyStopping('train_loss'), Checkpoint(folder, epochs=None, minutes=30), LAWA(every=100, **raw)]

def lightning(net, batches, epochs):
    import logging
    import lightning as L
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.model = net.new()
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        def training_step(self, batch, i): return loss_func(self.model(batch[0]), batch[1])
    where = dict(accelerator='gpu' if net.device.type=='cuda' else 'cpu', devices=1)
    shows = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(max_epochs=epochs, **where, **shows, precision='bf16-mixed' if net.bf16 else '32-true',
              enable_checkpointing=False).fit(Module(), batches)

def accelerate(net, batches, epochs):
    from accelerate import Accelerator
    acc = Accelerator(mixed_precision='bf16' if net.bf16 else 'no', cpu=net.device.type=='cpu')
    model = net.new()
    model,opt = acc.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True))
    for _ in range(epochs):
        for x,y in batches:
            with acc.autocast(): loss = loss_func(model(x), y)
            acc.backward(loss)
            opt.step()
            opt.zero_grad()

fast = lambda *more: partial(fastai, cbs=lambda: [FastLoop(), *(o() for o in more)])
with_ten = lambda *more: partial(fastai, cbs=lambda: [FastLoop(), *(o() for o in more), *ten()])
CASES = {"bare PyTorch, torch's fused Adam": bare, 'fastai': fastai, 'FastLoop': fast(),
         'FastLoop + FusedStep': fast(FusedStep), 'the same + 10 callbacks': with_ten(FusedStep),
         'FastLoop + FusedStep + Graphs': fast(FusedStep, Graphs),
         "FastLoop, torch's fused Adam": partial(fast(), opt_func=Fused),
         "FastLoop + Graphs, torch's fused Adam": partial(fast(Graphs), opt_func=Fused)}
if find_spec('lightning'): CASES['Lightning, no bar, no logger'] = lightning
if find_spec('accelerate'): CASES['Accelerate'] = accelerate
PROCESSES = {'Lightning, no bar, no logger': apart(), 'Accelerate': apart()}

def seconds(case, title, device, epochs=3):
    "Seconds a batch, in the time from the start of an epoch to the next start"
    net = nets(device)[title].to(device)
    default_device(device=='cuda')
    batches = Batches(net.batches)
    with open(os.devnull, 'w') as f, redirect_stdout(f), redirect_stderr(f): CASES[case](net, batches, epochs)
    return (batches.starts[-1]-batches.starts[-2])/len(batches)

def main():
    args = options(__doc__, rounds=5, device=True).parse_args()
    torch.set_float32_matmul_precision('high')
    here = lambda f,*a: f(*a)
    names = [k for k in CASES if args.device=='cuda' or 'Graphs' not in k]      # a CPU has none
    tables = {t: measure({k: partial(PROCESSES.get(k, here), seconds, k, t, args.device) for k in names},
                         args.rounds, 'µs a batch') for t in nets(args.device)}
    report(on_device('speed', args.device), tables, args.rounds, args.device, ('lightning','accelerate'))

if __name__=='__main__': main()
