"""Cost of a checkpoint: how long the training waits, bytes on disk, and how much slower the steps are while a
thread writes

The state is that of an MLP and Adam, three copies of the weights. The same run times a plain `torch.save` of
it, one copy in memory, and Lightning. `--device cuda` measures whole fits on a GPU, and nothing else.
"""
import gc, logging, os, warnings
from contextlib import redirect_stdout, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from statistics import median
from time import perf_counter
warnings.filterwarnings('ignore')

import torch, torch.nn.functional as F
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, Learner, OptimWrapper, default_device
from torch import nn
from torch.utils.data import TensorDataset
from fastai_callbacks_ext.checkpoint import Checkpoint
from fastai_callbacks_ext.base.files import map_state
from fastai_callbacks_ext.base.snapshot import Snapshot
from fastai_callbacks_ext.base.state import learner_state
from harness import apart, measure, options, ratio, report

STEPS,LR = 3,1e-3       # steps before the first save
SIZES = {1:(4, 512), 25:(24, 1024), 200:(12, 4096)}      # million parameters: layers, and their width
PLAIN,OURS,COPY,TENSORS = 'torch.save','Checkpoint, background','one copy of the state','tensors of the state'
FIRST = f'{OURS}, first of a fit'
EVERY = dict(cpu={1:30, 25:10, 200:4}, cuda={1:300, 25:200, 200:200})     # steps from one save to the next

def net(layers, width): return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])

def items(width):
    "Random ones, for batches of 2"
    x = torch.randn(2*STEPS, width)
    return TensorDataset(x, x)

def seconds(f, *args):
    start = perf_counter()
    f(*args)
    return perf_counter()-start

def clear(folder):
    "Megabytes of the files in `folder`, which are removed; the disk is idle then"
    files = [f for f in folder.rglob('*') if f.is_file()]
    mb = sum(f.stat().st_size for f in files)/1e6
    for f in files: f.unlink()
    os.sync()
    return mb

# fastai

class InFit(Callback):
    "Calls `f` with the learner, in the last batch of the epoch"
    order = Checkpoint.order+1
    def __init__(self, f): self.f = f
    def after_batch(self):
        if self.training and self.iter==STEPS-1: self.f(self.learn)

def fit(layers, width, folder, f):
    torch.manual_seed(42)
    dls = DataLoaders(*[DataLoader(items(width), bs=2) for _ in range(2)])
    learn = Learner(dls, net(layers, width), F.mse_loss, opt_func=Adam,
                    cbs=[Checkpoint(folder, epochs=None, keep=1), InFit(f)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, LR)

def state_of(learn): return learner_state(learn, (learn.checkpoint,))

def tensors_of(learn):
    tensors = []
    map_state(state_of(learn), tensors.append)
    return tensors

def plain(learn, folder): return seconds(torch.save, state_of(learn), folder/'plain.pt')

def ours(learn, folder, background=True, first=False):
    cb = learn.checkpoint
    cb.background = background
    if first:       # the fit began some steps ago
        cb._snapshot = Snapshot()
        cb._prepare()
        cb._writer.close()
    res = seconds(cb._save, learn.epoch, learn.iter+1)
    cb._writer.close()
    return res

def steps(learn, going):
    "Mean seconds of a step of the training, while `going()`"
    start,n = perf_counter(),0
    while going():
        learn._do_one_batch()
        n += 1
    return (perf_counter()-start)/n

def undisturbed(learn):
    end = perf_counter()+1
    return steps(learn, lambda: perf_counter()<end)

def writing(learn, folder):
    cb = learn.checkpoint
    cb.background = True
    cb._save(learn.epoch, learn.iter+1)
    res = steps(learn, lambda: cb._writer.busy)
    cb._writer.close()
    clear(folder)
    return res

# Whole fits

class Batches(list):
    "A loader of what is on the device already"
    device,bs,dataset = None,None,property(lambda self: self)
    def to(self, device): return self

class Clock(Callback):
    "Notes the seconds of each step, also of what the device still does; ends the fit after `n`"
    order = Checkpoint.order+1
    def __init__(self, n, at_end): self.n,self.at_end,self.times = n,at_end,[]
    def after_batch(self):
        if self.dls.device.type=='cuda': torch.cuda.synchronize()
        self.times.append(perf_counter())
        if len(self.times)<=self.n: return
        self.at_end(self.learn)
        raise KeyboardInterrupt      # without the last save, which training waits for

def in_a_fit(layers, width, every, device, folder):
    """Seconds that the first and a later save add to the longest step after it, and to all steps together

    Also those of `torch.save`."""
    torch.manual_seed(42)
    x,saved = torch.randn(2, width, device=device),[]
    batches = Batches([(x, x)]*(4*every))
    batches.device = torch.device(device)
    fused = partial(OptimWrapper, opt=partial(torch.optim.Adam, fused=True))
    clock = Clock(3*every, lambda learn: [saved.append(plain(learn, folder)) for _ in range(3)])
    learn = Learner(DataLoaders(batches, Batches()), net(layers, width).to(device), F.mse_loss,
                    opt_func=fused if device=='cuda' else Adam,
                    cbs=[Checkpoint(folder/'fit', epochs=None, steps=every, keep=1), clock])
    with redirect_stdout(None), learn.no_bar(), learn.no_logging(), suppress(KeyboardInterrupt):
        learn.fit(1, LR)
    steps = [b-a for a,b in zip(clock.times, clock.times[1:])]
    res = {PLAIN: median(saved)}
    usual = median(steps)
    for k,n in (FIRST, every),(OURS, 2*every):
        after = [o-usual for o in steps[n-2:n+every-2]]     # the save of step n is between times n-2 and n-1
        res |= {f'{k}: longest step':max(after), f'{k}: all steps':sum(after)}
    clear(folder)
    return res

def whole_fits(size, rounds, device, folder):
    layers,width = SIZES[size]
    left = {}
    def case(k):
        if k not in left: left.update(in_a_fit(layers, width, EVERY[device][size], device, folder))
        return left.pop(k)
    names = PLAIN, *(f'{k}: {what}' for what in ('longest step', 'all steps') for k in (FIRST, OURS))
    cases = {k:partial(case, k) for k in names}
    title = f'In a fit: {size} M parameters, {layers} layers of {width:,}'
    return {title: measure(cases, rounds, 'ms more than without')}

# Lightning

def lightning(layers, width, folder, background=False):
    res = _lightning(layers, width, folder, background)
    gc.collect()
    return res

def _lightning(layers, width, folder, background):
    import lightning as L
    from lightning.pytorch.plugins.io import AsyncCheckpointIO
    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.model = net(layers, width)
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=LR)
        def training_step(self, batch, i): return F.mse_loss(self.model(batch[0]), batch[1])
        def on_train_batch_end(self, out, batch, i):
            for _ in range(2*(i==STEPS-1)):     # the second one is measured, as of the others
                clear(folder)
                self.seconds = seconds(self.trainer.save_checkpoint, folder/'lightning.ckpt')
                for io in plugins: io._executor.submit(int).result()
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    module,plugins = Module(),[AsyncCheckpointIO()]*background
    L.Trainer(max_epochs=1, accelerator='cpu', devices=1, plugins=plugins, logger=False,
              enable_progress_bar=False, enable_checkpointing=False,
              enable_model_summary=False).fit(module, torch.utils.data.DataLoader(items(width), 2))
    return module.seconds

LIGHTNING = apart()

# What is measured

def tables(size, rounds, folder):
    "Of the model of `size` million parameters"
    layers,width = SIZES[size]
    title,res,mb = f'{size} M parameters, {layers} layers of {width:,}',{},{}
    def saved(name, f, *args):
        res = f(*args)
        mb[name] = clear(folder)
        return res
    def in_fit(learn):
        state = tensors_of(learn)
        copies = [t.clone() for t in state]
        saves = {PLAIN:(plain, learn, folder), OURS:(ours, learn, folder),
                 FIRST:(ours, learn, folder, True, True),
                 'Checkpoint, background=False':(ours, learn, folder, False),
                 COPY:(seconds, torch._foreach_copy_, copies, state)}
        if find_spec('lightning'):
            args = LIGHTNING,lightning,layers,width,folder
            saves |= {'Lightning':args, 'Lightning, AsyncCheckpointIO':(*args, True)}
        saves = {k:partial(saved, k, *o) for k,o in saves.items()}
        res[f'Training waits: {title}'] = measure(saves, rounds, 'ms a save')
        sizes = {TENSORS:sum(t.nbytes for t in state)/1e6, 'Checkpoint':mb[OURS]}
        sizes |= {k:mb[k] for k in (PLAIN,'Lightning') if k in mb}
        res[f'On disk: {title}'] = measure({k:partial(float, v) for k,v in sizes.items()}, 1, 'MB')
        copies.clear()
        cases = {'no checkpoint':partial(undisturbed, learn),
                 'while one is written':partial(writing, learn, folder)}
        res[f'Training goes on: {title}'] = measure(cases, rounds, 'ms a step')
    fit(layers, width, folder, in_fit)
    clear(folder)
    return res

IN_A_FIT = [f'{k}: longest step' for k in (FIRST, OURS)]

def limits(device):
    "Rows of each kind of table, what they are compared with, and the largest ratio"
    return {'Training waits': [(OURS, PLAIN, 0.25), (FIRST, PLAIN, 0.25), (OURS, COPY, 1.5)],
            'In a fit': [(o, PLAIN, 0.15 if device=='cuda' else 0.25) for o in IN_A_FIT],
            'On disk': [('Checkpoint', TENSORS, 1.05)]}

def targets(tables, device):
    "The ratios that the package is held to; a model of 1 M is too small for those of time"
    for table in tables:
        what,_,title = table.partition(': ')
        for row,over,limit in limits(device).get(what, ()):
            if what=='On disk' or not title.startswith('1 M'):
                yield dict(table=table, row=row, over=over, limit=limit,
                           ratio=ratio(dict(tables=tables), table, row, over))

# The command

def main():
    parser = options(__doc__, rounds=5)
    parser.add_argument('--sizes', type=int, nargs='+', choices=SIZES, default=list(SIZES),
                        help='in million parameters (default: all)')
    parser.add_argument('--device', choices=list(EVERY), default='cpu')
    args = parser.parse_args()
    cpu = args.device=='cpu'
    if cpu and not find_spec('lightning'): print('Lightning is not installed: its rows are left out')
    default_device(not cpu)
    results = {}
    with TemporaryDirectory(prefix='checkpoint', dir='/tmp') as folder:
        for size in args.sizes:
            if cpu: results |= tables(size, args.rounds, Path(folder))
            results |= whole_fits(size, args.rounds, args.device, Path(folder))
            gc.collect()
    facts = dict(targets=list(targets(results, args.device)))
    name,others = ('checkpoint', ('lightning',)) if cpu else ('checkpoint_cuda', ())
    report(name, results, args.rounds, args.device, others, **facts)
    print('\nTargets')
    for t in facts['targets']:
        met = 'met' if t['ratio']<=t['limit'] else 'MISSED'
        print(f"{met:8}{t['ratio']:.2f} for at most {t['limit']:.2f}: {t['row']} / {t['over']} "
              f"({t['table']})")

if __name__=='__main__': main()
