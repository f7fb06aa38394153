"""Train an AWD-LSTM language model with its penalties AR and TAR; see its perplexity

    python examples/recipes/language_model.py --path runs/language_model
    python examples/recipes/language_model.py --text my/book.txt --epochs 10"""
from fastai.text.all import *
from fastai_callbacks_ext.all import *
from pydoc_data.topics import topics

# small; without the `|`, the size of the paper
CONFIG = awd_lstm_lm_config | dict(emb_sz=64, n_hid=64, n_layers=1)

@call_parse
def main(
    path:Path='runs/language_model', # Folder for the model
    text:Path=None, # A text file; without it, a part of Python's language reference
    epochs:int=3, # How often to go through the text
):
    set_seed(42)
    text = text.read_text('utf-8') if text else ' '.join(topics.values())[:100_000]
    df = pd.DataFrame({'text': [' '.join(o) for o in chunked(text.split(), 500)]})
    dls = TextDataLoaders.from_df(df, text_col='text', is_lm=True, seed=42,
                                  bs=8, seq_len=32)
    model = get_language_model(AWD_LSTM, len(dls.vocab), CONFIG, drop_mult=0.2)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=Perplexity(), path=path,
                    cbs=rnn_cbs(alpha=2, beta=1))
    # or pretrained (a download), with fastai's callbacks swapped for these:
    # learn = upgrade(language_model_learner(dls, AWD_LSTM, metrics=Perplexity()))
    learn.fit_one_cycle(epochs, 2e-2,
                        cbs=[GradientClip(0.25), SaveTopK('perplexity', k=1)])
    print(f'perplexity of the best epoch: {learn.validate()[1]:.1f}')
