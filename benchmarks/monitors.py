"""Cost of a training batch with what shows a run, over the fit without, beside fastai's and Lightning's

Then delays that are put into each part of a step, as `Throughput` finds them, and the time that a report
takes. With --batches, one long fit with all monitors, and how much memory it holds on to.
"""
import os, tempfile, warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from time import perf_counter, sleep
from typing import NamedTuple
warnings.filterwarnings('ignore')

import torch
from fastai.basics import DataLoaders, Learner
from fastai.callback.hook import ActivationStats as FastaisActivationStats
from fastai.callback.progress import CSVLogger
from fastai.callback.tensorboard import TensorBoardCallback
from fasttransform import Pipeline
from torch.utils.data import DataLoader, RandomSampler, Subset, TensorDataset
from torchvision.models import resnet18
from fastai_callbacks_ext.all import (ActivationStats, FastLoop, ItemStats, LayerStats, RunLog, Sink,
                                      Throughput, monitors, report as write_report)
from fastai_callbacks_ext.test_utils import digits_learner
from harness import apart, measure, options, ratio, report
from loop import EPOCHS, LR, NETS, Net, check_memory, lightning, loss_func, net

# Loaders of PyTorch's own class: `ItemStats` knows their items

class Starts(RandomSampler):
    "Notes when each epoch begins"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.times = []
    def __iter__(self):
        self.times.append(perf_counter())
        return super().__iter__()

class Sizes(NamedTuple):
    items: int          # in a batch
    batches: int        # in an epoch, a multiple of 50

def resnet():
    torch.manual_seed(42)
    data = TensorDataset(torch.randn(128, 3, 32, 32), torch.randint(10, (128,)))
    return Net(partial(resnet18, num_classes=10), data)

TINY,DIGITS = list(NETS)[:2]
RESNET = 'ResNet-18: 16 images of 32 x 32 a batch'
SIZES = {TINY: Sizes(8, 400), DIGITS: Sizes(64, 100), RESNET: Sizes(16, 50)}

@cache
def named(title): return resnet() if title==RESNET else net(title, 'cpu')

def loader_of(title):
    bs,n = SIZES[title]
    data = named(title).data
    return DataLoader(data, bs, sampler=Starts(data, replacement=True, num_samples=bs*n))

def silent(f, *args, **kwargs):
    with open(os.devnull, 'w') as out, redirect_stdout(out), redirect_stderr(out): return f(*args, **kwargs)

def train(net, model, loader, cbs, epochs=EPOCHS):
    "fastai's callback for TensorBoard needs a validation: of one batch"
    valid = DataLoader(Subset(net.data, range(loader.batch_size)), loader.batch_size)
    learn = Learner(DataLoaders(loader, valid), model, loss_func, cbs=cbs())
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, LR)

def seconds(title, train, **kwargs):
    "Seconds a batch in the last epoch but one, from its start to that of the last"
    net,loader = named(title),loader_of(title)
    silent(train, net, net.model(), loader, **kwargs)
    before,after = loader.sampler.times[-2:]
    return (after-before)/len(loader)

# What shows a run

class Slow(Sink):
    "A tracker whose server is slow"
    name = 'slow'
    def log(self, numbers, step): sleep(.2)

class Broken(Sink):
    "A tracker whose server is not there"
    name = 'broken'
    def log(self, numbers, step): raise ConnectionError('no server')

def ours(*make): return lambda: [FastLoop(), *(o() for o in make)]

PLAIN,FAST,ALL = 'plain fastai','FastLoop()','FastLoop(), all monitors'
CASES = {
    PLAIN: list,
    "fastai's CSVLogger": lambda: [CSVLogger()],
    "fastai's ActivationStats": lambda: [FastaisActivationStats(with_hist=True, every=50)],
    FAST: ours(),
    'FastLoop(), RunLog()': ours(RunLog),
    'FastLoop(), Throughput()': ours(Throughput),
    'FastLoop(), LayerStats()': ours(LayerStats),
    'FastLoop(), ActivationStats()': ours(partial(ActivationStats, with_hist=True)),
    'FastLoop(), ItemStats()': ours(ItemStats),
    ALL: lambda: [FastLoop(), *monitors()[:-1]]}        # but the report, which is written after the fit
SINKS = {
    'FastLoop(), RunLog()': ours(RunLog),
    'a sink that sleeps 0.2 s': ours(partial(RunLog, sinks=Slow())),
    'a sink that raises': ours(partial(RunLog, sinks=Broken()))}
if find_spec('tensorboard'):
    CASES["fastai's TensorBoardCallback"] = \
        lambda: [TensorBoardCallback(tempfile.mkdtemp(), trace_model=False, log_preds=False)]
    SINKS['TensorBoard'] = ours(partial(RunLog, sinks='tensorboard'))
LIGHTNING = {'Lightning, CSV logger': {}, 'Lightning, CSV logger, ThroughputMonitor': dict(monitor=True)} \
            if find_spec('lightning') else {}

def of_lightning(title, kwargs): return seconds(title, partial(lightning, shown=True, **kwargs))

def cost(title, cases, rounds, peers=()):
    epochs = 2 if title==RESNET else EPOCHS
    of = lambda cbs: partial(seconds, title, train, cbs=cbs, epochs=epochs)
    there = apart()         # once Lightning is imported, plain fastai takes longer
    rows = {k: of(cbs) for k,cbs in cases.items()}
    rows |= {k: partial(there, of_lightning, title, LIGHTNING[k]) for k in peers}
    return measure(rows, rounds, 'µs a batch')

# Where delays are found

def wait(ms):
    "A loop: `sleep` takes longer than it is asked for"
    end = perf_counter()+ms/1000
    while perf_counter()<end: pass

def delayed(part, ms):
    "A learner in which `part` of each training step takes `ms` longer"
    learn = digits_learner(n=1000)
    dl,pause = learn.dls.train,lambda *args: wait(ms) if learn.training else None
    if part=='data':
        own = dl.create_batch
        dl.create_batch = lambda b: (pause(), own(b))[1]
    if part=='transforms':
        half = lambda o: (wait(ms/2 if learn.training else 0), o)[1]     # for x and for y
        dl.after_batch = Pipeline([half])
    if part=='forward': learn.model.register_forward_hook(pause)
    if part=='backward': next(learn.model.parameters()).register_hook(pause)
    if part=='optimizer':
        learn.create_opt()
        step = learn.opt.step
        learn.opt.step = lambda *args,**kwargs: (pause(), step(*args, **kwargs))[1]
    return learn

def found(part, ms):
    "Seconds a step in `part`, by `Throughput`"
    learn,t = delayed(part, ms),Throughput()
    with learn.no_bar(), learn.no_logging(): silent(learn.fit, 5, cbs=t)
    return t.table().ms_a_step[part]/1000

def delays(rounds):
    "What `Throughput` finds more than without the delay"
    more = lambda part,ms: found(part, ms)-found(part, 0)
    return measure({f'{ms} ms in {part}': partial(more, part, ms)
                    for part in ('data','transforms','forward','backward','optimizer') for ms in (5,20,50)},
                   rounds, 'ms a step more')

def report_seconds(title):
    net,learn_cbs = named(title),monitors('reports')[:-1]
    silent(train, net, net.model(), loader_of(title), lambda: learn_cbs)
    def write():
        start = perf_counter()
        write_report('reports')
        return perf_counter()-start
    return write

# The command

def soak(batches):
    "One fit of the tiny net with all monitors"
    title = TINY
    loader = loader_of(title)
    check_memory(named(title), loader, batches, lambda: [FastLoop(), *monitors()[:-1]])

def main():
    parser = options(__doc__, 5)
    parser.add_argument('--batches', type=int, help='train the tiny net for so many batches')
    args = parser.parse_args()
    os.chdir(tempfile.mkdtemp())
    if args.batches: return soak(args.batches)
    tables = {title: cost(title, CASES, args.rounds, LIGHTNING) for title in (TINY,DIGITS)}
    tables[RESNET] = cost(RESNET, {k: o for k,o in CASES.items() if k.startswith(FAST)}, args.rounds)
    tables['Trackers: digits'] = cost(DIGITS, SINKS, args.rounds)
    tables['Delays'] = delays(min(args.rounds, 3))
    tables['Report'] = measure({'of the digits': report_seconds(DIGITS)}, args.rounds, 's')
    results = report('monitors', tables, args.rounds, packages=('lightning','tensorboard'))
    print('\nTarget: at most 1.01, tiny network 1.10')
    for title in SIZES:
        print(f'{ratio(results, title, ALL, FAST):.3f}  {ALL} / {FAST} ({title.split(":")[0]})')

if __name__=='__main__': main()
