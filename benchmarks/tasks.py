"""The tasks of `benchmarks/do_they_help.py`: small ones, on data that come with scikit-learn and Python

A seed draws which items are trained on. `run` draws the weights and the order of the batches.
"""
import re, sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from fastai.tabular.all import *
from fastai_callbacks_ext.all import layer_groups, rnn_cbs
from fastai_callbacks_ext.test_utils import digits_model
from sklearn.datasets import load_diabetes, load_digits
sys.path.insert(0, str(Path(__file__).parents[1]/'examples'))
import language_model

class Task(NamedTuple):
    learner: object         # Makes a learner, of a seed, a run, callbacks, and more for `Learner`
    epochs: int
    lr: float               # Learning rate: the best of three or four for the plain `fit_one_cycle`
    free: float             # That of the schedule-free optimizer
    has: str                # See `LACKS`
    inputs: object = None   # Which inputs `MixUp` mixes
    unit: str = 'accuracy, %'

LACKS = dict(images='no images', real='only words', words='no words', body='no body',
             epochs='too short')      # what a technique may need: why it is left out

def split(n, n_train, seed):
    "Numbers of the items to train on, and of those to validate on"
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:n_train],order[n_train:]

def loaders(x, y, parts, bs):
    train,valid = [[*zip(x[o], y[o])] for o in parts]
    return DataLoaders(DataLoader(train, bs, shuffle=True), DataLoader(valid, 256))

def classifier(dls, model, cbs, **kwargs):
    return Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, **kwargs)

# Digits

@cache
def images():
    x,y = map(torch.tensor, load_digits(return_X_y=True))
    return (x/16).float().view(-1,1,8,8),y.long()

def digits(seed, run, cbs=None, **kwargs):
    x,y = images()
    set_seed(run)
    return classifier(loaders(x, y, split(len(y), 600, seed), 64), digits_model(), cbs, **kwargs)

def half(first, n, seed, bs):
    "Batches of five of the ten digits"
    x,y = images()
    chosen = (y>=first)&(y<first+5)
    return loaders(x[chosen], y[chosen]-first, split(int(chosen.sum()), n, seed), bs)

@cache
def body():
    "Weights of a network that has learned the digits 0 to 4; the head is left out"
    set_seed(0)
    learn = classifier(half(0, 700, 0, 64), digits_model(), None)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(8, 1e-2)
    return {k: v for k,v in learn.model.state_dict().items() if k[0]!='8'}

def fine_tuned(seed, run, cbs=None, **kwargs):
    weights = body()
    set_seed(run)
    net = digits_model()
    net.load_state_dict(weights, strict=False)
    kwargs = dict(splitter=layer_groups(decay=.75)) | kwargs
    return classifier(half(5, 50, seed, 10), net, cbs, **kwargs)

# Texts

@cache
def paragraphs(n_topics=10, length=80):
    "Word numbers of the paragraphs of the longest topics, which of these each is from; the vocabulary's size"
    docs = language_model.without_copies(language_model.documents(None))
    parts = [(p, i) for i,d in enumerate(docs[:n_topics]) for p in dict.fromkeys(d.split('\n\n'))]
    copies = Counter(p for p,_ in parts)
    texts = [(re.findall(r'\w+|[^\w\s]', p.lower())[:length], i) for p,i in parts if copies[p]==1]
    texts = [(ws, i) for ws,i in texts if len(ws)>=8]
    counts = Counter(w for ws,_ in texts for w in ws)
    often = [w for w,c in counts.items() if c>2]
    known = {w: k for k,w in enumerate(often, 2)}       # 0: no word; 1: a rare one
    x = torch.zeros(len(texts), length, dtype=torch.long)
    for row,(ws,_) in zip(x, texts): row[:len(ws)] = torch.tensor([known.get(w, 1) for w in ws])
    return x,torch.tensor([i for _,i in texts]),len(known)+2

class MeanOfWords(nn.Module):
    "The mean of the embeddings of a text, and two linear layers"
    def __init__(self, n_words, n_classes, size=64):
        super().__init__()
        self.words = nn.Embedding(n_words, size, padding_idx=0)
        self.head = nn.Sequential(nn.Dropout(.3), nn.Linear(size, size), nn.ReLU(), nn.Dropout(.3),
                                  nn.Linear(size, n_classes))
    def forward(self, x): return self.head(self.words(x).sum(1)/(x>0).sum(1, keepdim=True))

def texts(seed, run, cbs=None, **kwargs):
    x,y,n = paragraphs()
    set_seed(run)
    return classifier(loaders(x, y, split(len(y), 500, seed), 32), MeanOfWords(n, 10), cbs, **kwargs)

@cache
def corpus(n_docs=5, n_batches=10):
    "A part of the demo's corpus"
    language_model.set_seed(42)
    res = language_model.Corpus(None)
    res.train = res.train[:n_docs]
    res.valid = res.valid[:n_batches*language_model.BS*language_model.SEQ_LEN+1]
    return res

def language(seed, run, cbs=None, **kwargs):
    cbs = rnn_cbs(language_model.ALPHA, language_model.BETA) + L(cbs)
    learn = language_model.language_learner(corpus(), 'tiny', run, cbs)
    for k,v in kwargs.items(): setattr(learn, k, v)
    return learn

# Tables

def diabetes(seed, run, cbs=None, **kwargs):
    df = load_diabetes(as_frame=True, scaled=False).frame
    df['target'] = ((df.target-df.target.mean())/df.target.std()).astype('float32')
    numbers = [o for o in df.columns if o not in ('sex','target')]
    splits = [o.tolist() for o in split(len(df), 250, seed)]
    set_seed(run)
    dls = TabularPandas(df, [Categorify, FillMissing, Normalize], ['sex'], numbers, 'target',
                        y_block=RegressionBlock(), splits=splits).dataloaders(bs=32)
    config = tabular_config(ps=.1, embed_p=.05)
    return tabular_learner(dls, [64, 32], config=config, metrics=R2Score(), cbs=cbs, **kwargs)

TASKS = {
    'Digits': Task(digits, 12, 1e-2, 3e-2, 'images real epochs'),
    'Fine-tuning': Task(fine_tuned, 12, 1e-2, 3e-2, 'images real body epochs'),
    'Texts': Task(texts, 20, 2e-2, 3e-2, 'words epochs'),
    'Table': Task(diabetes, 15, 1e-2, 1e-2, 'real words epochs', 1, unit='R², %'),
    'Language': Task(language, 3, .1, .1, 'words', unit='perplexity')}
