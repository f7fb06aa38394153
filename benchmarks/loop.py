"""Cost of a training batch: a bare PyTorch loop, fastai, FastLoop, Lightning and Keras, on the same nets,
batches and optimizers

With --batches, no comparison: one long fit with FastLoop, and how much memory it holds on to.
"""
import gc, logging, os, sys, tempfile, warnings
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import cache, partial
from importlib.util import find_spec
from time import perf_counter
from typing import NamedTuple
warnings.filterwarnings('ignore')

import psutil, torch, torch.nn.functional as F
from fastai.basics import Adam, Callback, DataLoaders, Learner, OptimWrapper, Recorder, default_device
from fastai.callback.all import ModelResetter as FastaiModelResetter, RNNCallback as FastaiRNNCallback
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from fastai_callbacks_ext.all import FastLoop, ModelResetter, RNNCallback, RNNRegularizer, TerminateOnNaN
from fastai_callbacks_ext.test_utils import digits_model, text_learner
from harness import apart, measure, on_device, options, ratio, report, sync

EPOCHS,LR = 3,1e-3
TorchAdam = partial(OptimWrapper, opt=torch.optim.Adam)

# The nets and their batches

class Loader(DataLoader):
    "Gives whole batches, and notes when each epoch starts"
    def __init__(self, data, sampler=None):
        super().__init__(data, sampler=sampler, batch_size=None)
        self.starts = []
    def __iter__(self):
        sync()
        self.starts.append(perf_counter())
        return super().__iter__()

class Net(NamedTuple):
    model: object            # Makes the model
    data: object             # Dataset of batches, or of items of which `sampler` makes batches
    sampler: object = None
    needs: object = list     # Makes fastai's callbacks without which the model cannot be trained
    # Makes this package's callbacks that fit the model
    ours: object = lambda: [TerminateOnNaN(), ModelResetter(missing_ok=True)]

    def to(self, device):
        "On a GPU, the batches are there before the clock starts"
        if device=='cpu': return self
        batches = [[t.to(device) for t in b] for b in Loader(self.data, self.sampler)]
        return self._replace(model=lambda: self.model().to(device), data=batches, sampler=None)

def drawn(x, y, bs, n):
    "`n` batches of `bs` items an epoch, drawn with replacement"
    data = TensorDataset(x, y)
    return data,BatchSampler(RandomSampler(data, replacement=True, num_samples=bs*n), bs, drop_last=True)

def tiny():
    x,y = map(torch.tensor, load_breast_cancer(return_X_y=True))
    model = lambda: nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                                  nn.Linear(32, 2))
    return Net(model, *drawn(((x-x.mean(0))/x.std(0)).float(), y, 8, 1000))

def digits():
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    return Net(digits_model, *drawn((x/16).float().view(-1,1,8,8), y, 64, 200))

def text():
    batches = [[t.as_subclass(torch.Tensor) for t in b] for b in text_learner().dls.train]
    return Net(lambda: text_learner().model, batches,
               needs=lambda: [FastaiModelResetter(), FastaiRNNCallback()],
               ours=lambda: [ModelResetter(), RNNCallback(), RNNRegularizer(2, 1), TerminateOnNaN()])

TINY,IDLE = 'Tiny net: MLP 30-32-32-2, 8 rows a batch','One more idle callback, tiny net'
NETS = {TINY:tiny, 'Digits: CNN of 6,000 parameters, 64 images a batch':digits,
        'Language model: AWD-LSTM of 64 units, 16 x 20 words a batch':text}

@cache
def net(title, device):
    default_device(device=='cuda')
    torch.manual_seed(42)
    return NETS[title]().to(device)

# an AWD-LSTM gives its activations too
def output(pred): return pred[0] if isinstance(pred, tuple) else pred
def loss_func(pred, y): return F.cross_entropy(output(pred).flatten(0, -2), y.flatten())
def reset(model): getattr(model, 'reset', lambda: None)()

# The contenders: each trains `model` on what `loader` gives

class Idle(Callback): "Has no method at all"

def bare(net, model, loader, opt_func=Adam):
    opt = opt_func(list(model.parameters()), lr=LR)
    model.train()
    for _ in range(EPOCHS):
        reset(model)
        for x,y in loader:
            loss_func(model(x), y).backward()
            opt.step()
            opt.zero_grad()

def fastai(net, model, loader, cbs=list, idle=0, ours=False, bar=True, opt_func=Adam, epochs=EPOCHS):
    cbs = cbs() + (net.ours if ours else net.needs)() + [Idle() for _ in range(idle)]
    learn = Learner(DataLoaders(loader, []), model, loss_func, opt_func=opt_func, cbs=cbs)
    with ExitStack() as off:
        if not bar: off.enter_context(learn.no_bar()); off.enter_context(learn.no_logging())
        learn.fit(epochs, LR)

fast = partial(fastai, cbs=lambda: [FastLoop()])

def lightning(net, model, loader, shown=False, monitor=False):
    import lightning as L
    from lightning.pytorch.callbacks import ThroughputMonitor, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger
    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.model = model
        def on_train_epoch_start(self): reset(self.model)
        def configure_optimizers(self): return torch.optim.Adam(self.parameters(), lr=LR)
        def training_step(self, batch, i):
            loss = loss_func(self.model(batch[0]), batch[1])
            if shown: self.log('loss', loss, prog_bar=True)
            return loss
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as d:
        hidden = dict(logger=False, enable_progress_bar=False)
        shows = dict(logger=CSVLogger(d), callbacks=[TQDMProgressBar()]) if shown else hidden
        if monitor: shows['callbacks'].append(ThroughputMonitor(lambda b: len(b[0])))
        accelerator = 'gpu' if next(model.parameters()).is_cuda else 'cpu'
        trainer = L.Trainer(max_epochs=EPOCHS, accelerator=accelerator, devices=1, enable_checkpointing=False,
                            enable_model_summary=False, **shows)
        trainer.fit(Module(), loader)

class Output(nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return output(self.model(x))

def keras(net, model, loader, shown=False):
    os.environ.update(KERAS_BACKEND='torch', KERAS_TORCH_DEVICE=next(model.parameters()).device.type)
    import keras
    class Reset(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None): reset(model)
    wrapped = keras.Sequential([keras.layers.TorchModuleWrapper(Output(model))])
    wrapped.compile(keras.optimizers.Adam(LR), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    cbs = [Reset()] if hasattr(model, 'reset') else []
    wrapped.fit(loader, epochs=EPOCHS, verbose=int(shown), callbacks=cbs)

CASES = {
    'bare PyTorch': bare,
    'fastai': fastai,
    'fastai, no bar': partial(fastai, bar=False),
    'fastai + 10 idle callbacks': partial(fastai, idle=10),
    'FastLoop': fast,
    'FastLoop, no bar': partial(fast, bar=False),
    'FastLoop + 10 idle callbacks': partial(fast, idle=10),
    "FastLoop + this package's callbacks": partial(fast, ours=True),
    "bare PyTorch, torch's Adam": partial(bare, opt_func=torch.optim.Adam),
    "FastLoop, torch's Adam": partial(fast, opt_func=TorchAdam),
    "FastLoop, torch's Adam, no bar": partial(fast, opt_func=TorchAdam, bar=False)}
if find_spec('lightning'):
    CASES |= {'Lightning, no bar, no logger': lightning,
              'Lightning, bar and CSV logger': partial(lightning, shown=True)}
if find_spec('keras'): CASES |= {'Keras, no bar': keras, 'Keras, bar': partial(keras, shown=True)}
# once Lightning is imported, plain fastai takes a quarter longer
PROCESSES = {'Lightning':apart(), 'Keras':apart()}

# What is measured

def seconds(train, net, **kwargs):
    "Seconds a batch, in the time from the start of an epoch to the next start"
    loader = Loader(net.data, net.sampler)
    with open(os.devnull, 'w') as f, redirect_stdout(f), redirect_stderr(f):
        train(net, net.model(), loader, **kwargs)
    before,after = loader.starts[-2:]    # Keras starts the loader once more when an epoch ends
    return (after-before)/len(loader)

def seconds_of(case, title, device): return seconds(CASES[case], net(title, device))

def cases(title, device):
    "The contenders, each in the process that it needs"
    here = lambda f,*args: f(*args)
    return {k:partial(PROCESSES.get(k.split(',')[0], here), seconds_of, k, title, device) for k in CASES}

def one_more(train, net, n):
    "Seconds a batch that one more idle callback takes, from a fit with `n` of them"
    return (seconds(train, net, idle=n)-seconds(train, net))/n

FULL,LIKE = 'FastLoop + 10 idle callbacks',"FastLoop, torch's Adam"
# on this net, at most this ratio to that row; and on every net
TARGETS = {TINY:[(FULL, 'bare PyTorch', 1.25), (FULL, 'fastai', 0.6)]}
PEERS = [(LIKE, 'Lightning, bar and CSV logger', 1), (LIKE, 'Keras, bar', 1),
         (f'{LIKE}, no bar', 'Lightning, no bar, no logger', 1), (f'{LIKE}, no bar', 'Keras, no bar', 1)]

def targets(tables):
    "The ratios that were aimed at, and what they are"
    for title in NETS:
        for row,over,limit in TARGETS.get(title, [])+PEERS:
            if over not in CASES: continue
            found = round(ratio(dict(tables=tables), title, row, over), 3)
            yield dict(table=title, row=row, over=over, limit=limit, ratio=found)
    found = tables[IDLE]['rows']['FastLoop']['median']
    yield dict(table=IDLE, row='FastLoop', over='1 µs', limit=1, ratio=found)

class NoWait(list):
    "Batches; from the second to the end of the epoch, waiting for the GPU is an error"
    def __iter__(self):
        for i,b in enumerate(super().__iter__()):
            if i==1: torch.cuda.set_sync_debug_mode('error')
            yield b
        torch.cuda.set_sync_debug_mode('default')

def waits(train, net):
    "Does a training batch wait for the GPU?"
    try: train(net, net.model(), NoWait(net.data), bar=False)
    except RuntimeError as e:
        if 'synchronizing' not in str(e): raise
        return True
    finally: torch.cuda.set_sync_debug_mode('default')
    return False

class Memory(Callback):
    """Every `every` batches, empties the recorder's lists and prints the resident memory

    And how many objects Python keeps track of."""
    order,run_valid = Recorder.order+1,False
    def __init__(self, every): self.every,self.samples = every,[]
    def after_batch(self):
        if self.train_iter%self.every: return
        for o in ('lrs','losses','iters','values'): getattr(self.recorder, o).clear()
        gc.collect()
        self.samples.append((psutil.Process().memory_info().rss / 2**20, len(gc.get_objects())))
        line = '{:11,} batches {:10.2f} MB {:10,} objects'.format(self.train_iter, *self.samples[-1])
        print(line, file=sys.__stdout__, flush=True)

def check_memory(net, loader, batches, cbs):
    "Train for so many batches; an error if more memory is held on to in the second half"
    memory = Memory(batches//10)
    with open(os.devnull, 'w') as f, redirect_stdout(f):
        fastai(net, net.model(), loader, lambda: [*cbs(), memory], epochs=batches//len(loader))
    (mb0,objects0),(mb1,objects1) = memory.samples[len(memory.samples)//2-1],memory.samples[-1]
    print(f'In the second half: {mb1-mb0:+.2f} MB, {objects1-objects0:+,} objects')
    # Python takes memory from the system 1 MB at a time
    if mb1-mb0>4 or objects1-objects0>100: sys.exit('Memory grows')

# The command

def main():
    parser = options(__doc__, device=True)
    parser.add_argument('--batches', type=int,
                        help='train the tiny net for so many batches, in epochs of 1,000')
    args = parser.parse_args()
    if args.batches and args.batches<10_000: parser.error('expected --batches of at least 10,000')
    nets = {title:net(title, args.device) for title in NETS}
    if args.batches:
        tiny = nets[TINY]
        return check_memory(tiny, Loader(tiny.data, tiny.sampler), args.batches, lambda: [FastLoop()])
    tables = {title: measure(cases(title, args.device), args.rounds, 'µs a batch') for title in NETS}
    idle = {k:partial(one_more, train, nets[TINY], n)
            for k,train,n in (('fastai',fastai,20), ('FastLoop',fast,100))}
    tables[IDLE] = measure(idle, args.rounds, 'µs a batch')
    facts = dict(targets=list(targets(tables)))
    if args.device=='cuda':
        facts['waits'] = {title:{'fastai':waits(fastai, net), 'FastLoop':waits(fast, net)}
                          for title,net in nets.items()}
    report(on_device('loop', args.device), tables, args.rounds, args.device, ('lightning','keras'), **facts)
    print('\nTargets')
    for t in facts['targets']:
        met = 'met' if t['ratio']<=t['limit'] else 'MISSED'
        print(f"{met:8}{t['ratio']:.2f} for at most {t['limit']:.2f}: {t['row']} / {t['over']} "
              f"({t['table'].split(':')[0]})")
    for title,o in facts.get('waits', {}).items(): print(f'Waits for the GPU in a batch: {o} ({title})')

if __name__=='__main__': main()
