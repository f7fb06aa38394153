"Cost of a training step with each callback, over the same fit without it, beside fastai's own; ratios of medians of interleaved rounds"
import argparse, platform, statistics, time, warnings
warnings.filterwarnings('ignore')

import fastai, torch
import fastai.callback.rnn as fastai_rnn
from fastai.callback.all import TerminateOnNaNCallback
from fastai_callbacks_ext.all import ModelResetter, RNNCallback, RNNRegularizer, TerminateOnNaN
from fastai_callbacks_ext.test_utils import digits_learner, text_learner

def rnn(resetter, callback, regularizer=None): return [resetter(), callback()] + ([regularizer(alpha=2, beta=1)] if regularizer else [])

cases = {
    'digits CNN': (digits_learner, {
        'plain fastai': list,
        "fastai's TerminateOnNaNCallback": lambda: [TerminateOnNaNCallback()],
        'TerminateOnNaN()': lambda: [TerminateOnNaN()],
        'TerminateOnNaN(every=10)': lambda: [TerminateOnNaN(every=10)]}),
    'AWD-LSTM': (text_learner, {
        "fastai's rnn_cbs()": lambda: rnn(fastai_rnn.ModelResetter, fastai_rnn.RNNCallback),
        "fastai's rnn_cbs(2, 1)": lambda: rnn(fastai_rnn.ModelResetter, fastai_rnn.RNNCallback, fastai_rnn.RNNRegularizer),
        'rnn_cbs()': lambda: rnn(ModelResetter, RNNCallback),
        'rnn_cbs(2, 1)': lambda: rnn(ModelResetter, RNNCallback, RNNRegularizer)})}

def step_time(learner, cbs):
    "Seconds a training batch, validation included"
    learn = learner(cbs())
    learn.remove_cb(learn.progress)
    with learn.no_logging():
        learn.fit(1)
        start = time.perf_counter()
        learn.fit(2)
        return (time.perf_counter()-start) / (2*len(learn.dls.train))

def measure(learner, variants, rounds):
    "Median seconds a batch of each variant, measured in turn"
    times = {k:[] for k in variants}
    for _ in range(rounds):
        for k,cbs in variants.items(): times[k].append(step_time(learner, cbs))
    return {k:statistics.median(v) for k,v in times.items()}

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rounds', type=int, default=9)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f'{time.strftime("%Y-%m-%d")}, Python {platform.python_version()}, torch {torch.__version__}, fastai {fastai.__version__}, '
          f'{platform.machine()} CPU, 1 thread, {rounds} rounds')
    for name,(learner,variants) in cases.items():
        res = measure(learner, variants, rounds)
        first = next(iter(res.values()))
        print(f'\n{name:34}ms a batch   ratio')
        for k,t in res.items(): print(f'{k:34}{t*1e3:10.2f}{t/first:8.2f}')
