"Cost of a training step with the callbacks for RNNs, beside fastai's own"
import time, warnings
from functools import partial
warnings.filterwarnings('ignore')

import fastai.callback.rnn as fastai_rnn
from fastai_callbacks_ext.all import ModelResetter, RNNCallback, RNNRegularizer
from fastai_callbacks_ext.test_utils import text_learner
from harness import measure, options, report

def rnn(resetter, callback, regularizer=None):
    return [resetter(), callback()] + ([regularizer(alpha=2, beta=1)] if regularizer else [])

CASES = {
    'AWD-LSTM': (text_learner, {
        "fastai's rnn_cbs()": lambda: rnn(fastai_rnn.ModelResetter, fastai_rnn.RNNCallback),
        "fastai's rnn_cbs(2, 1)": lambda: rnn(fastai_rnn.ModelResetter, fastai_rnn.RNNCallback,
                                              fastai_rnn.RNNRegularizer),
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

if __name__=='__main__':
    rounds = options(__doc__).parse_args().rounds
    tables = {title: measure({k:partial(step_time, learner, cbs) for k,cbs in variants.items()}, rounds)
              for title,(learner,variants) in CASES.items()}
    report('callbacks', tables, rounds)
