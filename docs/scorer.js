// Sphinx's default scores; pages of the guide first, and of those the ones about a purpose
var Scorer = {
    score: ([docname, title, anchor, descr, score, filename, kind]) =>
        score + (/^guide\/(recipes|names)$/.test(docname) ? 20 : docname === "guide/choose" ? 30 :
                 docname.startsWith("guide/") ? 40 : docname.startsWith("tutorials/") ? 10 : 0),
    objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
    title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
