"""Cost of a training batch with the callbacks of the page on schedules, beside a plain fit and fastai's
schedules, with FastLoop and without. In time of the processor, which other programs lengthen less"""
import warnings
from functools import partial
from time import process_time
warnings.filterwarnings('ignore')

from fastai.basics import DataLoaders, Learner
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import ReduceLROnPlateau as Fastais
from fastai_callbacks_ext.all import Decay, FastLoop, ReduceLROnPlateau, Schedule
from harness import measure, options, ratio, report
from loop import LR, NETS, Loader, fastai, loss_func, net
from torch.utils.data import DataLoader

class Clocked(Loader):
    "Notes the processor's time when each epoch starts"
    def __iter__(self):
        self.starts.append(process_time())
        return DataLoader.__iter__(self)

def seconds(train, net):
    "Seconds a batch of the processor, from the start of an epoch to the next start"
    loader = Clocked(net.data, net.sampler)
    train(net, net.model(), loader)
    before,after = loader.starts[-2:]
    return (after-before)/len(loader)

def one_cycle(net, model, loader, cbs=list, epochs=2):
    learn = Learner(DataLoaders(loader, []), model, loss_func, cbs=cbs())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, LR)

plain = partial(fastai, bar=False, epochs=2)
plateau = dict(monitor='train_loss', patience=9)
CASES = {       # title: function that trains, callbacks
    'plain fit': (plain, list),
    "fastai's ParamScheduler, lr": (plain, lambda: [ParamScheduler({'lr': SchedCos(LR, 0)})]),
    'Schedule, lr': (plain, lambda: [Schedule.cosine()]),
    "fastai's fit_one_cycle, lr and mom": (one_cycle, list),
    'Schedule, lr and mom': (plain, lambda: [Schedule({'lr': [Decay()], 'mom': [Decay()]})]),
    "fastai's ReduceLROnPlateau": (plain, lambda: [Fastais(**plateau)]),
    'ReduceLROnPlateau': (plain, lambda: [ReduceLROnPlateau(**plateau)]),
    'Schedule and ReduceLROnPlateau': (plain, lambda: [Schedule.cosine(), ReduceLROnPlateau(**plateau)])}

def main():
    args = options(__doc__, rounds=5).parse_args()
    def case(title, train, cbs, more):
        return partial(seconds, partial(train, cbs=lambda: cbs()+more()), net(title, 'cpu'))
    tables = {}
    for kind,more in (('fastai', list), ('FastLoop', lambda: [FastLoop()])):
        for title in list(NETS)[:2]:
            cases = {k: case(title, *o, more) for k,o in CASES.items()}
            tables[f'{kind}. {title}'] = measure(cases, args.rounds, 'µs a batch')
    results = report('schedules', tables, args.rounds)
    print()
    for title in tables:
        over = ratio(results, title, 'Schedule, lr', "fastai's ParamScheduler, lr")
        print(f"{over:.2f} over fastai's ParamScheduler. {title}")

if __name__=='__main__': main()
