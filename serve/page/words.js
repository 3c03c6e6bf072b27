// Everything that the page says, in both languages.

const WORDS = {
  en: {
    language: "en-GB",
    other: "中文",
    otherLanguage: "zh-CN",
    gap: " ", // between sentences
    api: "API",
    user: "User",
    userHint: "type or pick a user id",
    howMany: "How many",
    seen: "include items already seen",
    version: "Model version",
    ownVersion: "the user's own",
    compare: "Compare with",
    noVersion: "nothing",
    share: (name, percent) => `${name} (${percent}% of users)`,
    show: "Recommend",
    recommendations: "Recommendations",
    by: (version) => `Recommendations by ${version}`,
    addHint: "Click an item to add it to the user's history.",
    history: "History, newest first",
    noHistory: "Nothing is known about this user yet.",
    model: "Model",
    loading: "Looking…",
    empty: "Nothing to recommend.",
    key: "Key",
    live: "live",
    degraded: "What the user did of late cannot be read now.",
    legend: "What an item is judged by:",
    historyLegend: "What the history is read by:",
    weights: "Weights of the views",
    add: (name) => `Add to the history: ${name}`,
    similar: "Similar",
    similarTo: (name) => `Similar to ${name}`,
    likeness: "How alike they are, 1 at most:",
    why: "Why",
    whyOf: (name) => `Why ${name}`,

    added: (name) => `Added: ${name}.`,
    changed: (fresh, moved) => `New in the list: ${fresh}. Moved: ${moved}.`,
    compared: (both, k, same) => `${both} of ${k} items are in both lists, ${same} of them at the same rank.`,
    sameVersion: "Both lists are by the same version.",
    up: (n) => `up ${n}`,
    down: (n) => `down ${n}`,
    same: "same rank",
    fresh: "new",
    onlyHere: "only here",

    whyWeights: "How much each view counts in this item:",
    whyScore: (score, baseline) =>
      `The score is ${score}. It would be ${baseline} if every event of the history were of an average item; the events add the rest:`,
    whyPopular: "It is here since many people chose it; nothing that this user did led to it.",
    otherEvents: "all other events",
    through: (parts) => `by ${parts}`,
    sameItem: "being the same item",
    whyRanks: (rank) => `It is at rank ${rank}. If the model did not know one of the views, it would be at:`,
    without: (view) => `without ${view}`,
    rank: (rank) => `rank ${rank}`,
    item: "Item",

    errors: {
      invalid_request: "The service refuses this:",
      not_found: "The service does not have this:",
      unauthorized: "The service asks for a key.",
      overloaded: "The service is busy; try again in a moment.",
      timeout: "The service took too long; try again in a moment.",
      state_unavailable: "What users do cannot be stored now; try again in a moment.",
      internal: "Something went wrong inside the service.",
      unreachable: "The service cannot be reached; try again in a moment.",
      other: "The service did not answer:",
    },
    rungs: {
      history: "Based on what this user did.",
      profile: "Based on what is known about this user; there are no events yet.",
      popularity: "Popular with everybody: this user is not known.",
    },
  },
  zh: {
    language: "zh-CN",
    other: "English",
    otherLanguage: "en",
    gap: "",
    api: "接口",
    user: "用户",
    userHint: "输入或选择用户编号",
    howMany: "数量",
    seen: "包括已看过的物品",
    version: "模型版本",
    ownVersion: "该用户所属版本",
    compare: "对比版本",
    noVersion: "不对比",
    share: (name, percent) => `${name}（${percent}% 的用户）`,
    show: "推荐",
    recommendations: "推荐结果",
    by: (version) => `${version} 的推荐结果`,
    addHint: "点击物品，即可加入该用户的历史记录。",
    history: "历史记录（最新在前）",
    noHistory: "对该用户暂时一无所知。",
    model: "模型",
    loading: "查询中…",
    empty: "没有可推荐的物品。",
    key: "密钥",
    live: "实时",
    degraded: "暂时无法读取该用户的最新行为。",
    legend: "物品依据以下视图评判：",
    historyLegend: "历史记录依据以下视图解读：",
    weights: "各视图的权重",
    add: (name) => `加入历史记录：${name}`,
    similar: "相似",
    similarTo: (name) => `与“${name}”相似的物品`,
    likeness: "相似程度（最大为 1）：",
    why: "原因",
    whyOf: (name) => `为何推荐“${name}”`,

    added: (name) => `已加入：${name}。`,
    changed: (fresh, moved) => `新出现 ${fresh} 个，名次变动 ${moved} 个。`,
    compared: (both, k, same) => `${k} 个物品中有 ${both} 个两边都有，其中 ${same} 个名次相同。`,
    sameVersion: "两边是同一个版本。",
    up: (n) => `上升 ${n} 位`,
    down: (n) => `下降 ${n} 位`,
    same: "名次相同",
    fresh: "新",
    onlyHere: "仅此列",

    whyWeights: "各视图在该物品中所占的比重：",
    whyScore: (score, baseline) =>
      `得分为 ${score}。若历史中每次行为都针对一个平均的物品，得分应为 ${baseline}；其余来自各次行为：`,
    whyPopular: "因为很多人选择了它；与该用户的行为无关。",
    otherEvents: "其他行为合计",
    through: (parts) => `来自 ${parts}`,
    sameItem: "同一物品",
    whyRanks: (rank) => `目前排第 ${rank} 位。若模型看不到某个视图，它会排在：`,
    without: (view) => `没有 ${view}`,
    rank: (rank) => `第 ${rank} 位`,
    item: "物品",

    errors: {
      invalid_request: "服务拒绝了该请求：",
      not_found: "服务中没有此内容：",
      unauthorized: "此服务需要密钥。",
      overloaded: "服务繁忙，请稍后再试。",
      timeout: "服务超时，请稍后再试。",
      state_unavailable: "暂时无法保存用户行为，请稍后再试。",
      internal: "服务内部出错。",
      unreachable: "无法连接服务，请稍后再试。",
      other: "服务没有回应：",
    },
    rungs: {
      history: "依据该用户的行为记录。",
      profile: "依据该用户的资料；尚无行为记录。",
      popularity: "大家都喜欢的热门物品：该用户未知。",
    },
  },
};

let language = remembered() ?? (navigator.language.startsWith("zh") ? "zh" : "en");

export const words = () => WORDS[language];

export function changeLanguage() {
  language = language === "zh" ? "en" : "zh";
  try {
    localStorage.setItem("language", language);
  } catch {
    // a browser that keeps nothing: the choice holds until the page is left
  }
}

function remembered() {
  try {
    const kept = localStorage.getItem("language");
    return Object.hasOwn(WORDS, kept) ? kept : null;
  } catch {
    return null;
  }
}
